"""What benchmarks/pretrain.py, instruct.py and gpu_suite.py compare with: the published step, and the Hugging Face Trainer.

The published step is written anew from what the authors' release does. Every step reads its records again with wfdb, scales them with a z-score per
lead in float64, encodes them lead after lead, and cuts five windows out of each ECG's 313 tokens. Each window with the step after it is a row of its own,
padded on the left to 316 tokens: 1,580 forwarded for 58 that are supervised. The model runs with eager attention and a mask, and computes all logits.
What the release does beside it is left out, to its benefit: it prints every loss, validates every second step, and quantises the model to four bits.
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import deepspeed
import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from toolkit.ecg.leads import LEADS
from toolkit.shards.packing import Packed
from toolkit.tasks.vocabulary import ECGVocabulary
from toolkit.tokenizer import heartllm
from toolkit.tokenizer.fsq import ids_of

ROOT = Path(__file__).resolve().parents[1]
SCALES = ((283, 30), (142, 15), (70, 7), (35, 4), (17, 2))  # (window, step) in tokens
SUPERVISED = sum(step for _, step in SCALES)  # 58 an ECG
ROW = 316  # the longest: BOS, start, 283 + 30, end
BATCH = 4  # ECGs per rank, as released
LEVELS = [6, 6, 6, 6]


def read(paths: list[str]) -> torch.Tensor:
    """float32 [n, 12, 5000]: z-scores per lead."""
    import wfdb  # not here on a machine that has gpu_suite.py to run alone

    signals = [wfdb.rdsamp(path)[0] for path in paths]
    scaled = [(signal - signal.mean(0)) / signal.std(0) for signal in signals]
    return torch.tensor(np.stack(scaled), dtype=torch.float32).transpose(1, 2)


class PublishedLM(nn.Module):
    """Encoder (not trained, random weights: for its cost) and language model; the forward is from signals to the mean loss."""

    def __init__(self, lm: PreTrainedModel, vocabulary: ECGVocabulary, bos: int, pad: int):
        super().__init__()
        self.lm, self.vocabulary, self.bos, self.pad = lm, vocabulary, bos, pad
        lm.set_attn_implementation("eager")
        self.encoder = heartllm.Encoder(len(LEADS), len(LEVELS)).eval().requires_grad_(False)

    def forward(self, signals: torch.Tensor) -> torch.Tensor:
        """signals: [n, 12, 5000] -> mean cross-entropy over the 58 n step tokens."""
        with torch.no_grad():  # in the model's own precision, bf16 where it is, as there (29 ms an ECG on one core, 38 ms in float32)
            codes = ids_of(torch.sigmoid(self.encoder.as_released(signals.to(self.encoder.to_code.weight.dtype)).float()), LEVELS)
        ids, mask, labels = [], [], []
        for ecg in codes.tolist():
            for window, step in SCALES:
                start = step * random.randint(0, (len(ecg) - window - step) // step)
                tokens = [code + self.vocabulary.first for code in ecg[start : start + window + step]]
                row = [self.bos, self.vocabulary.start, *tokens, self.vocabulary.end]
                empty = ROW - len(row)
                ids.append([self.pad] * empty + row)
                mask.append([0] * empty + [1] * len(row))
                labels.append([-100] * (empty + 2 + window) + tokens[window:] + [-100])
        input_ids, attention_mask, targets = (torch.tensor(rows, device=signals.device) for rows in (ids, mask, labels))
        return self.lm(input_ids=input_ids, attention_mask=attention_mask, labels=targets, use_cache=False).loss


def published(args, turns, lm, tokenizer, vocabulary, ecgs: int, bf16: bool) -> None:
    """Rounds of the published step over the same number of ECGs, under ZeRO-2 as the release runs it."""
    from sharding.manifest import read_manifest

    module = PublishedLM(lm, vocabulary, tokenizer.bos_token_id, tokenizer.pad_token_id)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-4, fused=True)
    batch, ranks = BATCH, int(os.environ["WORLD_SIZE"])
    config = {"train_batch_size": batch * ranks, "train_micro_batch_size_per_gpu": batch, "bf16": {"enabled": bf16}, "zero_optimization": {"stage": 2},
              "steps_per_print": 10**9}  # fmt: skip
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    manifest = read_manifest(args.work / "manifest")
    paths = manifest[manifest["split"] == "train"]["path"].tolist()
    at, steps = int(os.environ["RANK"]), max(1, ecgs // (batch * ranks))
    turns.begin()
    for _ in range(turns.rounds + 1):
        for _ in range(steps):
            signals = read([paths[(at * batch + i) % len(paths)] for i in range(batch)])
            loss = engine(signals)
            engine.backward(loss)
            engine.step()
            loss.detach().cpu()
            at += ranks
        turns.over("theirs", steps * batch * SUPERVISED)


def padded_samples(row: Packed) -> list[dict]:
    """What a user of the Trainer would have made of the same ECGs: a sample each sequence, token ids and labels (-100 where nothing is predicted).

    A group with several branches becomes a sample each branch, all with the prefix before it; nothing of such a prefix may be a target.
    """
    labels = torch.full((len(row.input_ids),), -100)
    labels[torch.from_numpy(row.predict_at + 1)] = torch.from_numpy(row.targets)
    ids, samples = torch.from_numpy(row.input_ids), []
    for start, end, branches in row.layout:
        edges = np.cumsum([end, *branches])
        for at, stop in zip(edges, edges[1:]) if branches else [(end, end)]:
            samples.append({name: torch.cat([of[start:end], of[at:stop]]) for name, of in (("input_ids", ids), ("labels", labels))})
    return samples


def collator(pad: int) -> Callable[[list[dict]], dict]:
    """Batches of `padded_samples`, padded on the right to the longest, with their mask."""

    def collate(batch: list[dict]) -> dict:
        columns = {"input_ids": ([s["input_ids"] for s in batch], pad), "labels": ([s["labels"] for s in batch], -100)}
        columns["attention_mask"] = [torch.ones_like(s["input_ids"]) for s in batch], 0
        return {name: pad_sequence(rows, batch_first=True, padding_value=value) for name, (rows, value) in columns.items()}

    return collate


def real_tokens(batch: dict) -> int:
    return int(batch["attention_mask"].sum())


def hf_trainer(
    args, turns, lm, samples: list[dict], size: int, pad: int, grouped: bool, bf16: bool, count: Callable[[dict], int] = real_tokens, accumulation: int = 1
) -> None:
    """Rounds of transformers.Trainer with ds_configs/zero2.json over batches of `size` samples per rank, dynamically padded; `count` is of a batch."""
    config = json.loads((ROOT / "ds_configs" / "zero2.json").read_text()) | {"data_types": {"grad_accum_dtype": "fp32"}}  # as our resolver sets it
    counted = [0]

    class Counting(Trainer):
        def compute_loss(self, model, inputs, **more):
            counted[0] += count(inputs)
            return super().compute_loss(model, inputs, **more)

    class Rounds(TrainerCallback):
        def on_train_begin(self, *_, **__):
            turns.begin()

        def on_step_end(self, _, state, control, **__):
            if state.global_step % args.steps == 0:
                turns.over("theirs", counted[0])
                counted[0] = 0

    arguments = TrainingArguments(
        output_dir=str(args.work / "theirs"), deepspeed=config, use_cpu=True, bf16=bf16, per_device_train_batch_size=size, num_train_epochs=1,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3, warmup_steps=20, max_grad_norm=1.0, weight_decay=0.0, adam_beta2=0.95, optim="adamw_torch_fused", lr_scheduler_type="cosine",
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
        train_sampling_strategy="group_by_length" if grouped else "random",
    )  # fmt: skip
    Counting(lm, arguments, data_collator=collator(pad), train_dataset=samples, callbacks=[Rounds()]).train()

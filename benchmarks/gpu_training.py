"""Parts of benchmarks/gpu_suite.py that train the 3 B shape, world 1, and the Hugging Face Trainer beside each. `rehearsal`: tiny shapes on the CPU."""

import importlib.util
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import HfDeepSpeedConfig

from benchmarks.baselines import collator, padded_samples
from benchmarks.gpu_parts import ECGS, QUESTIONS, SEQ_LEN, made, peak_gb, question_groups, random_row, shape, wait
from toolkit.lm.checkpointing import checkpoint_layers
from toolkit.lm.flops import peak_flops, row_flops
from toolkit.lm.kernels import apply
from toolkit.lm.lora import add_lora
from toolkit.lm.model import PackedLM
from toolkit.shards.order import MicroBatch
from toolkit.shards.packing import Group, Packed, Sequence, pack
from toolkit.training import distributed, ds_config
from toolkit.training.engine import build_engine, take_step

ROOT = Path(__file__).resolve().parents[1]
WARM_UP, TIMED = 2, 5  # optimizer steps
ACCUMULATION, ROWS = 4, 2  # micro-batches of one row: of pretraining, of instruction tuning
LORA = 16, 16, 0.0  # rank, alpha, dropout: the defaults of launchers/instruct.py


def pretraining_rows(words, vocabulary, rehearsal: bool) -> list[Packed]:
    return [random_row(words, vocabulary, 700 if rehearsal else SEQ_LEN, seed) for seed in range(ACCUMULATION)]


def question_rows(words, vocabulary, rehearsal: bool) -> tuple[list[Packed], list[Packed]]:
    """Rows whose questions share their ECG, and the same pairs of ECG and question in rows of plain sequences."""
    shared, pairs = [], []
    for seed in range(ROWS):
        groups = question_groups(words, vocabulary, *((1, 3) if rehearsal else (ECGS, QUESTIONS)), seed)
        join = lambda a, b: Group(Sequence(np.concatenate([a.ids, b.ids]), np.concatenate([a.target, b.target])), [])
        shared.append(pack(groups))
        pairs.append(pack([join(group.prefix, branch) for group in groups for branch in group.branches]))
    return shared, pairs


def training(stage: int, checkpointing: str, rehearsal: bool) -> list[dict]:
    """The real step of pretraining over packed rows."""
    config, words, vocabulary = shape("tiny" if rehearsal else "Llama-3.2-3B")
    return [ours(config, pretraining_rows(words, vocabulary, rehearsal), stage, checkpointing, False, rehearsal)]


def instruction(checkpointing: str, rehearsal: bool) -> list[dict]:
    """The real step of LoRA on questions that share their ECG."""
    config, words, vocabulary = shape("tiny" if rehearsal else "Llama-3.2-3B")
    rows, _ = question_rows(words, vocabulary, rehearsal)
    found = ours(config, rows, 2, checkpointing, True, rehearsal)
    return [{**found, "pairs/s": sum(len(branches) for row in rows for *_, branches in row.layout) / found["s a step"]}]


def ours(config, rows: list[Packed], stage: int, checkpointing: str, lora: bool, rehearsal: bool) -> dict:
    """Optimizer steps over the rows, a micro-batch each."""
    ranks = distributed.start()
    args = SimpleNamespace(per_device_train_batch_size=1, gradient_accumulation_steps=len(rows), max_grad_norm=1.0, learning_rate=1e-5, weight_decay=0.0)
    resolved = ds_config.resolve(str(ROOT / f"ds_configs/zero{stage}.json"), args, ranks.world, True, config.hidden_size)
    alive = HfDeepSpeedConfig(resolved) if stage == 3 else None  # while it lives, models are born sharded
    lm = made(config, ranks.device, torch.bfloat16)
    del alive
    lm = add_lora(lm, *LORA) if lora else lm
    checkpoint_layers(lm, checkpointing)
    how = apply(lm, "auto", ranks.device)
    flops = row_flops(lm)
    engine = build_engine(PackedLM(lm, how), args, resolved)
    micro = [MicroBatch(row, len(row.targets), len(row.input_ids), len(row.layout)) for row in rows]
    targets, times = sum(m.targets for m in micro), []
    for _ in range(1 + 1 if rehearsal else WARM_UP + TIMED):
        wait(ranks.device)
        started = time.perf_counter()
        take_step(engine, lambda engine, row: engine(row), micro, targets, ranks, None, [], (0, 0))
        wait(ranks.device)
        times.append(time.perf_counter() - started)
    label = {"what": f"heartspeed, ZeRO-{stage}{', LoRA' if lora else ''}", "checkpointing": checkpointing, "kernels": how}
    return {**label, **speed(times[1 if rehearsal else WARM_UP :], rows, sum(map(flops, rows)), ranks.device)}


def speed(times: list[float], rows: list[Packed], flops: float, device: torch.device) -> dict:
    """Of optimizer steps over `rows`: tokens/s, MFU, seconds, peak memory."""
    peak, source = peak_flops(device, True)
    tokens, step = sum(len(row.input_ids) for row in rows), median(times)
    return {"tokens/s": tokens / step, "MFU %": 100 * flops / step / peak, "s a step": step, "tokens a step": tokens, "peak GB": peak_gb(device),
            "peak": source}  # fmt: skip


def hf_trainer(checkpointing: str, rehearsal: bool) -> list[dict]:
    """transformers.Trainer on the ECGs of `training`, a sample each, as many in a micro-batch."""
    config, words, vocabulary = shape("tiny" if rehearsal else "Llama-3.2-3B")
    rows = pretraining_rows(words, vocabulary, rehearsal)
    return [theirs(config, rows, len(rows), checkpointing, False, rehearsal)]


def hf_instruction(checkpointing: str, rehearsal: bool) -> list[dict]:
    """transformers.Trainer with PEFT on the pairs of `instruction`, a padded sample each, those of one ECG a micro-batch. Every pair has its own ECG, so
    tokens and FLOPs are more than there; what compares is pairs/s."""
    config, words, vocabulary = shape("tiny" if rehearsal else "Llama-3.2-3B")
    _, rows = question_rows(words, vocabulary, rehearsal)
    found = theirs(config, rows, len(rows) * (1 if rehearsal else ECGS), checkpointing, True, rehearsal)
    return [{**found, "pairs/s": sum(len(row.layout) for row in rows) / found["s a step"]}]


def theirs(config, rows: list[Packed], accumulation: int, checkpointing: str, lora: bool, rehearsal: bool) -> dict:
    """transformers.Trainer with ds_configs/zero2.json over the sequences of the rows; with Liger where it is installed."""
    device, steps = distributed.start().device, 2 if rehearsal else WARM_UP + TIMED
    lm = made(config, device, torch.bfloat16)
    lm = add_lora(lm, *LORA) if lora else lm
    flops = row_flops(lm)
    samples = [sample for row in rows for sample in padded_samples(row)] * steps
    zero = json.loads((ROOT / "ds_configs/zero2.json").read_text()) | {"data_types": {"grad_accum_dtype": "fp32"}}
    liger = device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    marks = []

    class Marks(TrainerCallback):
        def on_step_end(self, *_, **__):
            wait(device)
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out, deepspeed=zero, use_cpu=rehearsal, bf16=True, per_device_train_batch_size=len(samples) // steps // accumulation,
            gradient_accumulation_steps=accumulation, max_steps=steps, learning_rate=1e-5, save_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True, remove_unused_columns=False, use_liger_kernel=liger, gradient_checkpointing=checkpointing == "full",
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        Trainer(lm, arguments, data_collator=collator(0), train_dataset=samples, callbacks=[Marks()]).train()
    times = [b - a for a, b in zip(marks, marks[1:])][0 if rehearsal else WARM_UP - 1 :]
    label = {"what": f"HF Trainer, ZeRO-2{', PEFT' if lora else ''}", "checkpointing": checkpointing, "kernels": "liger" if liger else "eager"}
    return {**label, **speed(times, rows, sum(map(flops, rows)), device)}

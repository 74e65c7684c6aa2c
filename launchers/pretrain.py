"""Pretrain a causal LM on next-ECG-token prediction.

deepspeed launchers/pretrain.py --deepspeed ds_configs/zero2.json --backbone tiny --shards runs/demo/shards --output_dir runs/demo/pretrain

The output folder is a plain Hugging Face model with its tokenizer: `AutoModelForCausalLM.from_pretrained("runs/demo/pretrain")`.
`--max_steps 0` writes the backbone with the ECG vocabulary, untrained.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from toolkit.errors import UserError
from toolkit.evaluation.cards import tokenizer_of
from toolkit.lm import kernels
from toolkit.lm.backbone import STAMP, backbone_digest, check_stamp, load_backbone, save_stamp
from toolkit.lm.carried import FOLDER
from toolkit.lm.checkpointing import checkpoint_layers
from toolkit.lm.flops import row_flops
from toolkit.lm.model import PackedLM
from toolkit.lm.show import look
from toolkit.lm.trainable import choose_trainable, merged_state
from toolkit.lm.vocabulary import ecg_vocabulary, extend
from toolkit.shards.order import spaced
from toolkit.shards.statistics import bigram_entropy, unigram_entropy
from toolkit.tasks.corpus import corpus
from toolkit.tasks.data import ForecastData
from toolkit.training.arguments import LanguageModelArguments, arg, parse
from toolkit.training.distributed import launcher, start, sum_over_ranks
from toolkit.training.loop import Job, train
from toolkit.training.shards import TrainingShardArguments, open_shards, trained_on
from toolkit.training.validation import mean_loss
from toolkit.training.zero3 import place_backbone, whole_state


@dataclass(kw_only=True)
class PretrainArguments(TrainingShardArguments, LanguageModelArguments):
    stage: ClassVar = "pretrain"

    backbone: str = arg("tiny (5 M parameters, made on the spot), smollm2, or any causal LM: a folder or a hub name such as meta-llama/Llama-3.2-3B.")
    shards: str = arg("Token shards written by `python -m sharding.shard`: a folder, or the URL of one (s3://, gs://, https://, ...).")
    objective: Literal["causal", "windows"] = arg(
        "causal: predict every ECG token. windows: as the authors' release, the steps after five windows of each ECG, 58 tokens.", "causal"
    )
    train: Literal["full", "new_rows", "lora+norms+embeddings"] = arg(
        "What is trained. new_rows: the ECG tokens' rows of embedding and head alone. lora+norms+embeddings: as the authors' release, rank 64.", "full"
    )
    head: Literal["full", "ecg"] = arg("Tokens the softmax is over: the whole vocabulary (exact), or the ECG tokens alone (faster).", "full")
    seq_len: int = arg("Tokens per row; a row holds as many whole ECGs as fit (13 in 4096), which do not see each other.", 4096)
    per_device_train_batch_size: int = arg("Rows per rank and micro-batch.", 1)
    report_targets: Literal["auto", "yes", "no"] = arg("Predict each ECG's report after it as well. auto: if the backbone never saw text (tiny).", "auto")
    gain_tokens: bool = arg("Put 12 tokens before each ECG that say its leads' amplitudes. A backbone that has such tokens goes on with them.", False)
    learning_rate: float | None = arg("Peak learning rate. Default 0.25 / hidden size: 1e-3 for tiny, 4e-4 for smollm2, 8e-5 for Llama-3.2-3B.", None)


def main() -> None:
    args = parse(PretrainArguments, __doc__)
    (shards, valid_shards), skipped = open_shards(args, ["train", "valid"], "tokens")
    # going on from a model that knows ECG tokens already: they must be these
    stamp = check_stamp(args.backbone, shards.index, "--backbone") if (Path(args.backbone) / STAMP).is_file() else None
    knows_text = stamp["knows_text"] if stamp else args.backbone != "tiny"
    reports = args.report_targets == "yes" or (args.report_targets == "auto" and not knows_text and args.head == "full")
    if reports and args.head == "ecg":
        raise UserError("--head ecg: its softmax knows no words; leave out --report_targets yes")
    if args.train == "new_rows" and args.weight_decay:
        raise UserError("--weight_decay: with --train new_rows it would move the rows that are not trained; leave it at 0")
    ranks = start()

    def make():
        model, tokenizer = load_backbone(args.backbone, lambda: corpus(shards), args.seed)
        extend(model, tokenizer, shards.index["levels"], args.seed, knows_text, args.gain_tokens)
        return model, tokenizer

    model, tokenizer = place_backbone(make, args, ranks)
    vocabulary, hidden_size = ecg_vocabulary(tokenizer), model.config.hidden_size
    if args.learning_rate is None:
        args.learning_rate = 0.25 / hidden_size
    torch.manual_seed(args.seed)  # LoRA's first weights, the same on all ranks
    lm = choose_trainable(model, vocabulary, args.train)
    checkpoint_layers(lm, args.gradient_checkpointing)
    if args.compile:
        kernels.compile_layers(lm)
    head_rows = vocabulary.code_rows if args.head == "ecg" else None
    packed = PackedLM(lm, kernels.apply(lm, args.kernels, ranks.device), head_rows)
    data = ForecastData(shards, tokenizer, vocabulary, reports, args.objective, args.seq_len, args.seed)
    valid = ForecastData(valid_shards, tokenizer, vocabulary)
    chosen = spaced(len(valid), args.max_eval_samples)
    known = [entropy(shards, valid_shards, chosen, vocabulary.codes) if ranks.main else 0.0 for entropy in (unigram_entropy, bigram_entropy)]
    baselines = dict(zip(("unigram_perplexity", "bigram_perplexity"), map(math.exp, sum_over_ranks(known, ranks.device))))
    ecg_tokenizer = tokenizer_of(valid_shards) if "tokenizer_files" in shards.index else None

    def loss(engine, row):
        return engine(row)

    def evaluate(engine) -> dict:
        nats = mean_loss(engine, valid, loss, ranks, args.max_eval_samples, args.per_device_train_batch_size * data.samples_per_row)
        return {"eval_loss": nats, "eval_perplexity": math.exp(nats) if nats < 700 else math.inf, **baselines}

    def show(engine):
        return look(engine, tokenizer, vocabulary, valid_shards, ecg_tokenizer)

    def export(module: PackedLM, folder: Path) -> None:
        state = whole_state(module.lm, ranks)
        if ranks.main:
            model.save_pretrained(folder, state_dict=merged_state(state, module.lm))
            tokenizer.save_pretrained(folder)
            if ecg_tokenizer:
                ecg_tokenizer.save_pretrained(folder / FOLDER)
            save_stamp(folder, shards.index, knows_text, trained_on=trained_on(stamp, [shards], [args.shards]))

    identity = {"shards digest": shards.digest, "skipped shards": skipped, "backbone digest": backbone_digest(args.backbone, model)}
    flops = row_flops(lm, head_rows and len(head_rows))
    train(args, Job(packed, data, loss, evaluate, export, identity, show, flops, hidden_size), ranks, "pretrain")
    if ranks.main and data.cut_reports:
        print(f"{data.cut_reports} reports on rank 0 were longer than {data.report_room} tokens and were cut, so that rows keep to --seq_len")


if __name__ == "__main__":
    launcher(main)()

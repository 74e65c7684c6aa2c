"""Train the ECG tokenizer on the train split of a manifest.

deepspeed launchers/train_tokenizer.py --deepspeed ds_configs/zero1.json --manifest runs/demo/manifest --output_dir runs/demo/tokenizer

Without a GPU, on two ranks: deepspeed --num_gpus 2 launchers/train_tokenizer.py ... --max_steps 100
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `deepspeed launchers/x.py` puts launchers/ on the path, not the project

import numpy as np
import torch

from sharding.manifest import read_manifest, read_summary
from toolkit.ecg.quality import read_checked
from toolkit.ecg.records import RecordError
from toolkit.errors import UserError
from toolkit.shards.order import MicroBatch
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig
from toolkit.training.arguments import TrainingArguments, arg, parse
from toolkit.training.distributed import launcher, start
from toolkit.training.loop import Job, train
from toolkit.training.validation import mean_loss


@dataclass(kw_only=True)
class TokenizerArguments(TrainingArguments):
    manifest: str = arg("Folder written by `python -m sharding.prepare`.")
    decoder: Literal["small", "paper"] = arg("Decoder size: small (0.9 M parameters) trains on a CPU, paper (10.6 M) has the width of the authors'.", "small")
    learning_rate: float = arg("Peak learning rate of AdamW.", 2e-3)
    num_train_epochs: float = arg("Passes over the training ECGs.", 5.0)
    per_device_train_batch_size: int = arg("ECGs per rank and micro-batch.", 16)


class Recordings:
    """ECGs of a manifest split, rows (path, start, array); `inputs` is float32 [n, 12, 5000] mV. Read anew each time: under 1 ms an ECG."""

    def __init__(self, rows: list[tuple[str, float, str]], qc: str):
        self.rows, self.qc = rows, qc

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, samples: list[tuple[int, int]]) -> MicroBatch:
        ecgs = np.stack([self._read(i) for _, i in samples])
        tokens = len(ecgs) * ECGTokenizer.tokens_per_ecg
        return MicroBatch(torch.from_numpy(ecgs), targets=len(ecgs), tokens=tokens, ecgs=len(ecgs))

    def _read(self, i: int) -> np.ndarray:
        try:
            return read_checked(*self.rows[i], self.qc)[0]
        except RecordError as error:  # it was fine when the manifest was made
            raise UserError(f"--manifest: ECG {i} of a split: {error.message}; put the file back or run `python -m sharding.prepare` again") from error


def main() -> None:
    args = parse(TokenizerArguments, __doc__)
    if args.precision == "bf16":
        raise UserError("--precision: the tokenizer trains in fp32; bf16 would move its ids")
    manifest = read_manifest(args.manifest)
    qc, splits = read_summary(args.manifest)["arguments"]["qc"], {}
    for name in ("train", "valid"):
        rows = manifest[manifest["split"] == name].sort_values("key")
        splits[name] = Recordings(list(zip(rows["path"], rows["start"], rows["array"])), qc)
        if not len(rows):
            raise UserError(f"--manifest: {args.manifest} has no ECG in split {name}")
    ranks = start()
    torch.manual_seed(args.seed)
    model, valid = ECGTokenizer(TokenizerConfig(decoder=args.decoder)), splits["valid"]

    def loss(engine, ecgs):
        return engine(ecgs.to(ranks.device)) * len(ecgs)

    def evaluate(engine) -> dict:
        return {"eval_mse": mean_loss(engine, valid, loss, ranks, args.max_eval_samples, args.per_device_train_batch_size)}

    def export(module: ECGTokenizer, folder: Path) -> None:
        module.save_pretrained(folder)

    identity = {"manifest digest": read_summary(args.manifest)["digest"]}
    train(args, Job(model, splits["train"], loss, evaluate, export, identity, bf16=False), ranks, "tokenizer")


if __name__ == "__main__":
    launcher(main)()

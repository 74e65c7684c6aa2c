"""Train the ECG tokenizer on the train split of a manifest.

deepspeed launchers/train_tokenizer.py --deepspeed ds_configs/zero1.json --manifest runs/demo/manifest --output_dir runs/demo/tokenizer

Without a GPU, on two ranks: deepspeed --num_gpus 2 launchers/train_tokenizer.py ... --max_steps 100
"""

import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `deepspeed launchers/x.py` puts launchers/ on the path, not the project

import numpy as np
import torch

from sharding.manifest import MANIFEST, read_manifest
from toolkit.ecg.quality import check
from toolkit.ecg.records import RecordError, read_record
from toolkit.errors import UserError
from toolkit.files import digest
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
    """ECGs of a manifest split; `inputs` is float32 [n, 12, 5000] mV."""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, samples: list[tuple[int, int]]) -> MicroBatch:
        ecgs = np.stack([_read(self.paths[i]) for _, i in samples])
        tokens = len(ecgs) * ECGTokenizer.tokens_per_ecg
        return MicroBatch(torch.from_numpy(ecgs), targets=len(ecgs), tokens=tokens, ecgs=len(ecgs))


@lru_cache(maxsize=4096)  # 1 GB per rank: parsing a record takes 4 ms, a tenth of its training step
def _read(path: str) -> np.ndarray:
    try:
        return check(read_record(path))[0]
    except RecordError as error:  # it was fine when the manifest was made
        raise UserError(f"--manifest: {path}: {error.message}; put the file back or run `python -m sharding.prepare` again") from error


def main() -> None:
    args = parse(TokenizerArguments, __doc__)
    if args.precision == "bf16":
        raise UserError("--precision: the tokenizer trains in fp32; bf16 would move its ids")
    manifest = read_manifest(args.manifest)
    splits = {name: manifest[manifest["split"] == name].sort_values("key")["path"].tolist() for name in ("train", "valid")}
    for name, paths in splits.items():
        if not paths:
            raise UserError(f"--manifest: {args.manifest} has no ECG in split {name}")
    ranks = start()
    torch.manual_seed(args.seed)
    model, valid = ECGTokenizer(TokenizerConfig(decoder=args.decoder)), Recordings(splits["valid"])

    def loss(engine, ecgs):
        return engine(ecgs.to(ranks.device)) * len(ecgs)

    def evaluate(engine) -> dict:
        return {"eval_mse": mean_loss(engine, valid, loss, ranks, args.max_eval_samples, args.per_device_train_batch_size)}

    def export(module: ECGTokenizer, folder: Path) -> None:
        module.save_pretrained(folder)

    identity = {"manifest digest": digest(Path(args.manifest) / MANIFEST)}
    train(args, Job(model, Recordings(splits["train"]), loss, evaluate, export, identity, bf16=False), ranks, "tokenizer")


if __name__ == "__main__":
    launcher(main)()

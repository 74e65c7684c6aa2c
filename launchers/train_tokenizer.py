"""Train the ECG tokenizer on the train split of a manifest.

deepspeed launchers/train_tokenizer.py --deepspeed ds_configs/zero1.json --manifest runs/demo/manifest --output_dir runs/demo/tokenizer

Without a GPU, on two ranks: deepspeed --num_gpus 2 launchers/train_tokenizer.py ... --max_steps 100
For live signals (toolkit/tokenizer/streaming.py): --causal. As the authors' release: --arch heartllm.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `deepspeed launchers/x.py` puts launchers/ on the path, not the project

import numpy as np
import torch

from sharding.manifest import read_manifest, read_summary
from toolkit.ecg.noise import augment
from toolkit.ecg.quality import read_checked
from toolkit.ecg.records import RecordError
from toolkit.errors import UserError
from toolkit.shards.order import MicroBatch, sample_at
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig
from toolkit.training import ds_config
from toolkit.training.arguments import TrainingArguments, arg, parse
from toolkit.training.distributed import launcher, start, wants_bf16
from toolkit.training.loop import Job, train
from toolkit.training.validation import mean_loss

AUGMENTATIONS = ("augment_noise", "augment_wander", "augment_lead_dropout")


@dataclass(kw_only=True)
class TokenizerArguments(TrainingArguments):
    stage: ClassVar = "train_tokenizer"

    manifest: str = arg("Folder written by `python -m sharding.prepare`.")
    arch: Literal["heartspeed", "paper", "heartllm"] = arg("heartspeed: ours. paper: as the paper says. heartllm: as the authors' release.", "heartspeed")
    levels: list[int] = arg("Levels of each dimension of the quantiser; their product is the number of ECG tokens.", [6, 6, 6, 6])
    causal: bool = arg("Tokens that depend on no sample after them, as streaming needs.", False)
    augment_noise: float = arg("Probability that muscle, electrode or mains noise is added to an ECG. The target of all three is the ECG without it.", 0.0)
    augment_wander: float = arg("Probability that baseline wander is added to an ECG.", 0.0)
    augment_lead_dropout: float = arg("Probability that one to three leads of an ECG are set to zero.", 0.0)
    learning_rate: float | None = arg("Peak learning rate of AdamW. Default: 5e-3 for heartspeed, 2e-3 (the release's) for the others.", None)
    num_train_epochs: float = arg("Passes over the training ECGs.", 5.0)
    per_device_train_batch_size: int = arg("ECGs per rank and micro-batch.", 16)
    precision: Literal["auto", "bf16", "fp32"] = arg(
        "auto: bf16 where the processor is fast at it, else fp32. Weights, quantiser and validation are fp32 in any case.", "auto"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.learning_rate is None:
            self.learning_rate = 5e-3 if self.arch == "heartspeed" else 2e-3
        for name in AUGMENTATIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name}: must be a probability from 0 to 1, not {getattr(self, name)}")


class Recordings:
    """ECGs of a manifest split, rows (path, start, array); `inputs` are float32 [n, 12, 5000] mV, what is read, and what is to be made of it.

    Read anew each time: under 1 ms an ECG. augmentations: probabilities of noise, wander and lead dropout, drawn from (seed, epoch, index).
    """

    samples_per_row = 1

    def __init__(self, keys: list[str], rows: list[tuple[str, float, str]], qc: str, augmentations: tuple[float, float, float] = (0, 0, 0), seed: int = 0):
        self.keys, self.rows, self.qc, self.augmentations, self.seed = keys, rows, qc, augmentations, seed

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, seed: int, position: int) -> tuple[int, int]:
        return sample_at(seed, len(self), position)

    def key(self, index: int) -> str:
        return self.keys[index]

    def batch(self, samples: list[tuple[int, int]]) -> MicroBatch:
        ecgs = [self._read(i) for _, i in samples]
        tokens = len(ecgs) * ECGTokenizer.tokens_per_ecg
        read = target = torch.from_numpy(np.stack(ecgs))
        if any(self.augmentations):
            views = [augment(ecg, *self.augmentations, np.random.default_rng([self.seed, *sample])) for ecg, sample in zip(ecgs, samples)]
            read = torch.from_numpy(np.stack(views))
        return MicroBatch((read, target), targets=len(ecgs), tokens=tokens, ecgs=len(ecgs))

    def _read(self, i: int) -> np.ndarray:
        try:
            return read_checked(*self.rows[i], self.qc)[0]
        except RecordError as error:  # it was fine when the manifest was made
            raise UserError(f"--manifest: ECG {i} of a split: {error.message}; put the file back or run `python -m sharding.prepare` again") from error


def main() -> None:
    args = parse(TokenizerArguments, __doc__)
    if ds_config.read(args.deepspeed)["zero_optimization"]["stage"] == 3:
        raise UserError(f"--deepspeed: {args.deepspeed} has ZeRO stage 3, which such a small model has no use for; use ds_configs/zero1.json")
    config = TokenizerConfig(args.arch, args.levels, args.causal)
    manifest = read_manifest(args.manifest)
    qc, splits = read_summary(args.manifest)["arguments"]["qc"], {}
    for name in ("train", "valid"):
        rows = manifest[manifest["split"] == name].sort_values("key")
        augmentations = tuple(getattr(args, a) for a in AUGMENTATIONS) if name == "train" else (0, 0, 0)
        splits[name] = Recordings(list(rows["key"]), list(zip(rows["path"], rows["start"], rows["array"])), qc, augmentations, args.seed)
        if not len(rows):
            raise UserError(f"--manifest: {args.manifest} has no ECG in split {name}")
    ranks = start()
    torch.manual_seed(args.seed)
    model, valid = ECGTokenizer(config), splits["valid"]
    bf16 = wants_bf16(args)

    def loss(engine, inputs):
        ecgs, targets = (x.to(ranks.device) for x in inputs)
        return engine(ecgs, targets, bf16 and engine.module.training) * len(ecgs)

    def evaluate(engine) -> dict:
        return {"eval_mse": mean_loss(engine, valid, loss, ranks, args.max_eval_samples, args.per_device_train_batch_size)}

    def export(module: ECGTokenizer, folder: Path) -> None:
        if ranks.main:
            module.save_pretrained(folder)

    identity = {"manifest digest": read_summary(args.manifest)["digest"], "autocast": bf16}
    train(args, Job(model, splits["train"], loss, evaluate, export, identity, bf16=False, watch="eval_mse"), ranks, "train_tokenizer")


if __name__ == "__main__":
    launcher(main)()

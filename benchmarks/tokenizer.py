"""What a tokenizer's training costs and what it reaches, each architecture beside the authors'; real ECGs, folds 1-8 to train, fold 9 to judge.

    python benchmarks/tokenizer.py step                            # ECG/s and FLOPs of a training step, two minutes
    python benchmarks/tokenizer.py quality --minutes 10            # error on fold 9 after equal wall-clock time
    python benchmarks/tokenizer.py vocabularies --minutes 10       # bits a second against error and AUROC
    python benchmarks/tokenizer.py step --json step.json

Baseline: `heartllm`, the architecture of the authors' release, called lead after lead as their training does (all leads at once is no faster here). Each
in the batches it is fastest with, 4 ECGs for heartllm and 16 for the others; same optimizer and learning rate schedule, one process, two threads.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # this folder has a tokenizer.py too

from sharding import prepare
from sharding.manifest import read_manifest
from toolkit.ecg.leads import DURATION
from toolkit.ecg.quality import read_checked
from toolkit.tokenizer import diagnosis
from toolkit.tokenizer.fsq import quantise
from toolkit.tokenizer.metrics import code_usage, ecg_metrics
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig

BATCH, ROUNDS = 16, 5
HEARTLLM_BATCH = 4  # 2.5 ECG/s; 1.7 with 8, 1.6 with 16
CONFIGS = {
    "heartllm": TokenizerConfig("heartllm"),
    "paper": TokenizerConfig("paper"),
    "heartspeed": TokenizerConfig(),
    "causal": TokenizerConfig(causal=True),  # heartspeed too
}
VOCABULARIES = ([4, 4, 4, 4], [6, 6, 6, 6], [8, 5, 5, 5, 5])


def released_loss(tokenizer: ECGTokenizer, ecg: torch.Tensor) -> torch.Tensor:
    """The loss of `heartllm` as the release computes it, lead after lead."""
    x = tokenizer.normalise(ecg)[0]
    codes = quantise(torch.sigmoid(tokenizer.encoder.as_released(x)), tokenizer.config.levels)
    return F.mse_loss(tokenizer.decoder(codes)[..., : x.shape[-1]], x)


def optimizer_of(tokenizer: ECGTokenizer, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(tokenizer.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def plain_loss(tokenizer: ECGTokenizer, ecg: torch.Tensor) -> torch.Tensor:
    return tokenizer(ecg)


def bf16_loss(tokenizer: ECGTokenizer, ecg: torch.Tensor) -> torch.Tensor:
    return tokenizer(ecg, bf16=True)


def train_step(tokenizer: ECGTokenizer, loss: Callable, optimizer: torch.optim.Optimizer, ecg: torch.Tensor) -> None:
    value = loss(tokenizer, ecg)
    optimizer.zero_grad()
    value.backward()
    torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
    optimizer.step()


def step(data: dict, args: argparse.Namespace) -> list[dict]:
    """ECG/s and FLOPs of a training step (forward, backward, AdamW), rounds that take turns."""
    ways = {
        "heartllm, lead by lead": ("heartllm", released_loss, HEARTLLM_BATCH),
        "heartllm, leads at once": ("heartllm", plain_loss, HEARTLLM_BATCH),
        **{name: (name, plain_loss, BATCH) for name in ("paper", "heartspeed", "causal")},
        "heartspeed, bf16": ("heartspeed", bf16_loss, BATCH),
    }
    models, times, flops = {}, {name: [] for name in ways}, {}
    for name, (config, loss, _) in ways.items():
        tokenizer = make(CONFIGS[config])
        models[name] = (tokenizer, loss, optimizer_of(tokenizer, 1e-4))
        with FlopCounterMode(display=False) as counter:
            loss(tokenizer, torch.from_numpy(data["train"][:1])).backward()
        flops[name] = counter.get_total_flops()
    for _ in tqdm(range(ROUNDS + 1), desc="step", disable=None):
        for name, (_, _, batch) in ways.items():
            ecg = torch.from_numpy(data["train"][:batch])
            started = time.perf_counter()
            train_step(*models[name], ecg)
            times[name].append((time.perf_counter() - started) / batch)
    rate = {name: 1 / median(took[1:]) for name, took in times.items()}
    first = next(iter(ways))
    return [
        {
            "architecture": name,
            "batch": ways[name][2],
            "ECG/s": rate[name],
            "times the loop over leads": rate[name] / rate[first],
            "GFLOP an ECG": flops[name] / 1e9,
            "times less than heartllm": flops[first] / flops[name],
            "parameters": sum(p.numel() for p in models[name][0].parameters()),
        }
        for name in ways
    ]


def make(config: TokenizerConfig) -> ECGTokenizer:
    torch.manual_seed(0)
    return ECGTokenizer(config)


def trained(config: TokenizerConfig, rate: float, loss: Callable, ecgs: np.ndarray, minutes: float) -> tuple[ECGTokenizer, int]:
    """A tokenizer after `minutes` of training, and how many ECGs it saw; the cosine of the learning rate follows the clock, 30 steps of warm-up."""
    tokenizer, generator, order, steps = make(config), np.random.default_rng(1), np.zeros(0, int), 0
    optimizer, batch, started = optimizer_of(tokenizer, rate), HEARTLLM_BATCH if config.arch == "heartllm" else BATCH, time.perf_counter()
    with tqdm(total=round(60 * minutes), desc=f"{config.arch} {config.levels}", unit="s", disable=None) as bar:
        while (elapsed := time.perf_counter() - started) < 60 * minutes:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (steps + 1) / 30) * 0.5 * (1 + math.cos(math.pi * elapsed / 60 / minutes))
            if len(order) < batch:
                order = generator.permutation(len(ecgs))
            train_step(tokenizer, loss, optimizer, torch.from_numpy(ecgs[order[:batch]]))
            order, steps = order[batch:], steps + 1
            bar.n = round(elapsed)
            bar.refresh()
    return tokenizer.eval(), steps * batch


def judged(tokenizer: ECGTokenizer, ecgs: np.ndarray) -> tuple[float, dict]:
    """(mean squared error in lead variances, code usage) of encode and decode."""
    ids, errors = [], []
    for start in range(0, len(ecgs), BATCH):
        batch = ecgs[start : start + BATCH]
        codes, made = tokenizer.reconstruct(batch)
        ids.append(codes)
        errors.append(ecg_metrics(batch, made)["mse"])
    counts = np.bincount(np.concatenate(ids).ravel(), minlength=tokenizer.config.codes)
    usage = code_usage(counts, DURATION / tokenizer.tokens_per_ecg)
    return float(np.concatenate(errors).mean()), {name: usage[name] for name in ("used", "perplexity", "bits_per_second")}


def quality(data: dict, args: argparse.Namespace) -> list[dict]:
    """Error on fold 9 after equal wall-clock time, one after the other on the same machine, each at every learning rate of --rates."""
    rows = []
    for arch in args.archs:
        for rate in args.rates:
            loss = released_loss if arch == "heartllm" else bf16_loss if args.precision == "bf16" else plain_loss
            tokenizer, seen = trained(CONFIGS[arch], rate, loss, data["train"], args.minutes)
            error, usage = judged(tokenizer, data["valid"])
            rows.append({"architecture": arch, "learning rate": rate, "minutes": args.minutes, "ECGs seen": seen, "MSE": error, **usage})
    return rows


def vocabularies(data: dict, args: argparse.Namespace) -> list[dict]:
    """heartspeed with several vocabularies: bits a second, error, and what a classifier still finds in the reconstructions."""
    rows = []
    for levels in VOCABULARIES:
        loss = bf16_loss if args.precision == "bf16" else plain_loss
        tokenizer, _ = trained(TokenizerConfig(levels=levels), args.rates[-1], loss, data["train"], args.minutes)
        error, usage = judged(tokenizer, data["valid"])
        parts = {split: features(tokenizer, data, split) for split in ("train", "valid")}
        found = diagnosis.information(parts["train"], parts["valid"])
        kept = {kind: found[kind]["macro_auroc"] for kind in ("originals", "reconstructions")}
        low, high = found["drop_interval"]
        rows.append({"levels": levels, **usage, "MSE": error, **kept, "drop, low": low, "drop, high": high})
    return rows


def features(tokenizer: ECGTokenizer, data: dict, split: str) -> dict:
    """What `diagnosis.information` takes of a split."""
    kinds = {"originals": [], "reconstructions": []}
    for start in range(0, len(data[split]), BATCH):
        ecgs = data[split][start : start + BATCH]
        kinds["originals"].append(diagnosis.features(ecgs))
        kinds["reconstructions"].append(diagnosis.features(tokenizer.reconstruct(ecgs)[1]))
    rows = data[f"{split} rows"]
    labels = np.array([diagnosis.superclasses(codes) for codes in rows["labels"]])
    return {**{kind: np.concatenate(parts) for kind, parts in kinds.items()}, "labels": labels, "patient": rows["patient"].to_numpy()}


def load(root: Path, work: Path) -> dict:
    """ECGs float32 [n, 12, 5000] and manifest rows of folds 1-8 ("train") and 9 ("valid")."""
    prepare.main(["ptbxl", "--root", str(root), "--out", str(work / "manifest")])
    manifest, data = read_manifest(work / "manifest"), {}
    for split in ("train", "valid"):
        rows = manifest[manifest["split"] == split].sort_values("key")
        data[split] = np.stack([read_checked(*record)[0] for record in zip(rows["path"], rows["start"], rows["array"])])
        data[f"{split} rows"] = rows
    return data


def table(rows: list[dict]) -> str:
    """Rows with the same keys, as columns."""
    def text(value) -> str:
        return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    cells = [list(rows[0])] + [[text(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells)


def main() -> None:
    parts = {"step": step, "quality": quality, "vocabularies": vocabularies}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(parts), help="what to measure")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "ptbxl", help="a PTB-XL folder (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10, help="training of each tokenizer (default: %(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3], help="learning rates in quality, vocabularies takes the last (2e-3 4e-3)")
    parser.add_argument("--archs", nargs="+", default=["heartllm", "heartspeed"], choices=list(CONFIGS), help="in quality (default: both)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of heartspeed's training (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    args = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count()))
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as work:
        data = load(args.data, Path(work))
    results = {}
    for name in args.parts:
        results[name] = parts[name](data, args)
        print(f"\n{name}\n{table(results[name])}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

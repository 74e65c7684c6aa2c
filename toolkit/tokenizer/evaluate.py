"""Measure a tokenizer: what it keeps of an ECG, of its diagnosis, and of an ECG under noise.

    python -m toolkit.tokenizer.evaluate --tokenizer runs/demo/tokenizer --manifest runs/demo/manifest --split valid

Small variant: ... --max_ecgs 50 --noise_ecgs 10 --max_train_ecgs 200

OUT (TOKENIZER/evaluate-SPLIT unless given) then holds

    metrics.json    every figure; written last
    figures/        median and worst ECG of each PTB-XL super-class, original under reconstruction with the tokens below; overview.png
    tensorboard/    the same numbers and pictures

Three parts. Reconstruction: MSE, PRD, correlation, error by band, R peaks and QRS durations (toolkit/tokenizer/metrics.py, toolkit/ecg/beats.py), for all
ECGs of the split and by diagnosis. Noise: the same under added noise, against the clean ECG. Diagnostic information: toolkit/tokenizer/diagnosis.py.
Memory grows by 0.9 kB an ECG (and 17 kB for each whose diagnosis is judged), never by the recordings. The same arguments give the same figures.
"""

import argparse
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from sharding.manifest import SPLITS, read_manifest, read_summary
from toolkit.ecg.beats import compare_beats
from toolkit.ecg.leads import DURATION
from toolkit.ecg.noise import NOISES, add_noise
from toolkit.ecg.quality import read_checked
from toolkit.ecg.records import RecordError
from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.files import write_text
from toolkit.tokenizer import diagnosis
from toolkit.tokenizer.figures import cases, draw_case, draw_overview
from toolkit.tokenizer.metrics import code_usage, ecg_metrics, summarise
from toolkit.tokenizer.report import tables, to_tensorboard
from toolkit.tokenizer.tokenizer import ECGTokenizer

BATCH = 16
LABELS = 15  # the most frequent labels of the split get figures of their own
NOTE = "Research software: these figures describe a tokenizer on these recordings; they say nothing about its use on a patient."
NOISE_CONVENTION = (
    "Noise is added to the clean ECG at this SNR in every lead. `output` is the reconstruction of the noisy ECG against the CLEAN one, `input` the noisy ECG "
    "itself against the clean one: where output's error is lower, the tokenizer removed noise; where it is higher, it added error. `none` is the clean ECG."
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, `out` filled in. Raises UserError naming one that cannot be."""
    parser = argparse.ArgumentParser("python -m toolkit.tokenizer.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, type=Path, help="folder written by launchers/train_tokenizer.py")
    parser.add_argument("--manifest", required=True, type=Path, help="folder written by `python -m sharding.prepare`")
    parser.add_argument("--split", choices=SPLITS, default="valid", help="what to measure on (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the results (default: TOKENIZER/evaluate-SPLIT)")
    parser.add_argument("--max_ecgs", type=int, help="measure at most this many ECGs, evenly spaced over the split (default: all)")
    parser.add_argument("--noise_ecgs", type=int, default=200, help="of those, how many are measured under noise; 0: none (default: %(default)s)")
    parser.add_argument("--noise_snr", type=float, nargs="+", default=[24, 12, 6, 0], metavar="DB", help="signal-to-noise ratios (default: 24 12 6 0)")
    parser.add_argument(
        "--max_train_ecgs",
        type=int,
        default=4000,
        help="diagnostic information: at most this many ECGs of the train split to fit on, and of --split to judge; 0: leave it out (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    for name, least in (("max_ecgs", 1), ("noise_ecgs", 0), ("max_train_ecgs", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: has to be {least} or more")
    if not np.isfinite(args.noise_snr).all():
        raise UserError("--noise_snr: has to be finite, in dB")
    args.out = args.out or args.tokenizer / f"evaluate-{args.split}"
    return args


def spaced(rows: pd.DataFrame, most: int | None) -> pd.DataFrame:
    """`rows`, or `most` of them evenly spaced."""
    if most is None or len(rows) <= most:
        return rows
    return rows.iloc[np.arange(most) * len(rows) // most]


def batches(rows: pd.DataFrame, qc: str, what: str) -> Iterator[tuple[pd.DataFrame, np.ndarray]]:
    """Rows of a manifest and their ECGs float32 [n, 12, 5000], BATCH at a time, under a progress bar."""
    with tqdm(total=len(rows), desc=what, unit="ECG", dynamic_ncols=True, disable=None) as bar:
        for first in range(0, len(rows), BATCH):
            some, ecgs = rows.iloc[first : first + BATCH], []
            for key, path, start, array in zip(some["key"], some["path"], some["start"], some["array"]):
                try:
                    ecgs.append(read_checked(path, start, array, qc)[0])
                except RecordError as error:  # it was fine when the manifest was made
                    raise UserError(f"--manifest: ECG {key}: {error.message}; put the file back or run `python -m sharding.prepare` again") from error
            yield some, np.stack(ecgs)
            bar.update(len(some))


def measure(original: np.ndarray, reconstruction: np.ndarray) -> dict[str, np.ndarray]:
    """Each ECG's figures, name -> [n]: `ecg_metrics` and `compare_beats`."""
    beats = [compare_beats(x, y) for x, y in zip(original, reconstruction)]
    return ecg_metrics(original, reconstruction) | {name: np.array([beat[name] for beat in beats], np.float64) for name in beats[0]}


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def usage(tokenizer: ECGTokenizer, ids: np.ndarray) -> dict:
    """`code_usage` of a group's ids [N, 313], under the name `codes`."""
    counts = np.bincount(ids.ravel(), minlength=tokenizer.config.codes)
    return {"codes": code_usage(counts, DURATION / tokenizer.tokens_per_ecg)}


def measure_noise(tokenizer: ECGTokenizer, rows: pd.DataFrame, qc: str, ratios: list[float]) -> list[dict]:
    """One row a noise and SNR, `none` first: see NOISE_CONVENTION. An ECG has the same noise at every SNR, and in every run."""
    conditions = [("none", None)] + [(kind, snr) for kind in NOISES for snr in ratios]
    found = {condition: ([], [], [], []) for condition in conditions}
    for some, ecgs in batches(rows, qc, "noise"):
        clean_ids = None
        for kind, snr in conditions:
            noisy = ecgs
            if snr is not None:
                seeds = [[zlib.crc32(key.encode()), NOISES.index(kind)] for key in some["key"]]
                noisy = np.stack([add_noise(ecg, kind, snr, np.random.default_rng(seed)) for ecg, seed in zip(ecgs, seeds)])
            ids, output = tokenizer.reconstruct(noisy)
            clean_ids = ids if clean_ids is None else clean_ids
            before, after, changed, used = found[kind, snr]
            before.append(measure(ecgs, noisy))
            after.append(measure(ecgs, output))
            changed.append((ids != clean_ids).mean(1))
            used.append(ids)
    return [
        {
            "noise": kind,
            "snr_db": snr,
            "tokens_changed": float(np.concatenate(changed).mean()),
            "input": summarise(joined(before)),
            "output": summarise(joined(after)) | usage(tokenizer, np.concatenate(used)),
        }
        for (kind, snr), (before, after, changed, used) in found.items()
    ]


def described(rows: pd.DataFrame, ecgs: np.ndarray, reconstructions: np.ndarray) -> dict[str, np.ndarray]:
    """What `diagnosis.information` takes of a batch."""
    return {
        "originals": diagnosis.features(ecgs),
        "reconstructions": diagnosis.features(reconstructions),
        "labels": np.stack([diagnosis.superclasses(codes) for codes in rows["labels"]]),
        "patient": rows["patient"].to_numpy(),
    }


def groups_of(labels: pd.Series) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(super-classes, most frequent labels) that occur: name -> bool [N]."""
    matrix = np.stack([diagnosis.superclasses(codes) for codes in labels])
    superclasses = {name: member for name, member in zip(diagnosis.SUPERCLASSES, matrix.T) if member.any()}
    frequent = labels.explode().dropna().value_counts()
    frequent = sorted(frequent.index, key=lambda code: (-frequent[code], code))[:LABELS]
    return superclasses, {code: np.array([code in codes for codes in labels]) for code in frequent}


def pictures(out: Path, results: dict, ids: np.ndarray, mse: np.ndarray, groups: dict, rows: pd.DataFrame, qc: str, tokenizer: ECGTokenizer) -> list[Path]:
    """Draw overview.png, and the median and worst case of each group."""
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    draw_overview(folder / "overview.png", np.bincount(ids.ravel(), minlength=tokenizer.config.codes), results["all"]["band_error"], results["noise"])
    drawn = [folder / "overview.png"]
    for group, kind, index in tqdm(cases(mse, groups), desc="figures", unit="page", dynamic_ncols=True, disable=None):
        row = rows.iloc[index]
        ecg = read_checked(row["path"], row["start"], row["array"], qc)[0]
        _, reconstruction = tokenizer.reconstruct(ecg[None])
        drawn.append(folder / f"{group}-{kind}.png")
        title = f"{group}, {kind} case: {row['key']}, MSE {mse[index]:.3f} of each lead's variance ({' '.join(row['labels'])})"
        draw_case(drawn[-1], title[:140], ecg, reconstruction[0], ids[index])
    return drawn


def evaluate(args: argparse.Namespace) -> tuple[dict, str]:
    """Measure, draw and write; returns what metrics.json holds and the tables."""
    tokenizer = ECGTokenizer.from_pretrained(args.tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
    manifest, summary = read_manifest(args.manifest), read_summary(args.manifest)
    manifest, qc = manifest.sort_values("key"), summary["arguments"]["qc"]
    rows = spaced(manifest[manifest["split"] == args.split], args.max_ecgs)
    if not len(rows):
        raise UserError(f"--split {args.split}: {args.manifest} has no ECG in it; choose another of {', '.join(SPLITS)}")
    try:
        (args.out / "figures").mkdir(parents=True, exist_ok=True)
        (args.out / "metrics.json").unlink(missing_ok=True)  # no old figures beside half of the new
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {error.strerror}") from error

    superclasses, labels = groups_of(rows["labels"])
    diagnosed = [any(code in diagnosis.SUPERCLASS_OF for code in codes) for codes in manifest["labels"]]
    diagnosed = manifest[np.array(diagnosed, bool)]
    judged = set(spaced(diagnosed[diagnosed["key"].isin(rows["key"])], args.max_train_ecgs)["key"])
    train = spaced(diagnosed[diagnosed["split"] == "train"], args.max_train_ecgs)
    judged = judged if len(train) else set()

    ids, measured, test, fitted = [], [], [], []
    for some, ecgs in batches(rows, qc, args.split):
        codes, reconstructions = tokenizer.reconstruct(ecgs)
        ids.append(codes)
        measured.append(measure(ecgs, reconstructions))
        chosen = some["key"].isin(judged).to_numpy()
        if chosen.any():
            test.append(described(some[chosen], ecgs[chosen], reconstructions[chosen]))
    ids, measured = np.concatenate(ids), joined(measured)
    noise = measure_noise(tokenizer, spaced(rows, args.noise_ecgs), qc, args.noise_snr) if args.noise_ecgs else []
    if test:
        for some, ecgs in batches(train, qc, "train"):
            fitted.append(described(some, ecgs, tokenizer.reconstruct(ecgs)[1]))
        information = diagnosis.information(joined(fitted), joined(test))
    elif args.max_train_ecgs:
        information = {"skipped": "no ECG of the train split and of this one has a diagnostic SCP code (PTB-XL); SNOMED codes are not mapped to super-classes"}
    else:
        information = {"skipped": "--max_train_ecgs 0"}

    def by(groups: dict[str, np.ndarray]) -> dict:
        return {
            group: summarise({name: values[member] for name, values in measured.items()}) | usage(tokenizer, ids[member]) for group, member in groups.items()
        }

    everything = {"all": np.ones(len(rows), bool)}
    results = {
        "note": NOTE,
        "tokenizer": {"fingerprint": tokenizer.fingerprint(), **{name: getattr(tokenizer.config, name) for name in ("arch", "levels", "causal")}},
        "manifest": {"digest": summary["digest"], "split": args.split, "ecgs": len(rows), "of": int((manifest["split"] == args.split).sum())},
        "arguments": {"max_ecgs": args.max_ecgs, "noise_ecgs": args.noise_ecgs, "noise_snr": args.noise_snr, "max_train_ecgs": args.max_train_ecgs},
        **by(everything),
        "by_superclass": by(superclasses),
        "by_label": by(labels),
        "noise_convention": NOISE_CONVENTION,
        "noise": noise,
        "diagnosis": information,
    }
    text = tables(results)
    drawn = pictures(args.out, results, ids, measured["mse"], superclasses or everything, rows, qc, tokenizer)
    to_tensorboard(args.out, results, text, drawn)
    write_text(args.out / "metrics.json", json.dumps(results, indent=2) + "\n")
    return results, text


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    _, text = evaluate(args)
    print(f"{text}\n\n{args.out}: metrics.json, figures/, tensorboard/")


if __name__ == "__main__":
    exit_2_on_user_error(main)()

"""metrics.json of toolkit/tokenizer/evaluate.py for people: tables, and TensorBoard."""

import textwrap
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

COLUMNS = ("MSE", "PRD %", "corr", "R ms", "QRS ms", "missed %", "extra %")  # of `_figures`


def tables(results: dict) -> str:
    """All of it, as lines."""
    tokenizer, manifest = results["tokenizer"], results["manifest"]
    lines = [
        f"tokenizer {tokenizer['fingerprint']} ({tokenizer['arch']}, levels {tokenizer['levels']}), {manifest['ecgs']:,} of {manifest['of']:,} ECGs of the "
        f"{manifest['split']} split",
        "",
        *_codes(results["all"]["codes"]),
        "",
        *_groups(results),
        "",
        *_bands(results["all"]),
        "",
        *_noise(results),
        *_diagnosis(results["diagnosis"]),
        "",
        results["note"],
    ]
    return "\n".join(lines)


def to_tensorboard(out: Path, results: dict, text: str, drawn: list[Path]) -> None:
    """Scalars at step 0, those under noise over the SNR as step; a rerun replaces them."""
    board = SummaryWriter(str(out / "tensorboard"), purge_step=-100)
    groups = {"all": results["all"], **results["by_superclass"], **results["by_label"]}
    for group, figures in groups.items():
        for name, value in figures.items():
            if isinstance(value, float):
                board.add_scalar(f"{name}/{group}", value, 0)
    for name, value in results["all"]["codes"].items():
        board.add_scalar(f"codes/{name}", value, 0)
    for kind in ("originals", "reconstructions", "drop"):
        for name, value in results["diagnosis"].get(kind, {}).items():
            board.add_scalar(f"auroc_{kind}/{name}", value, 0)
    for row in results["noise"]:
        for side in ("input", "output") if row["snr_db"] is not None else ():
            for name in ("mse", "r_error_ms", "qrs_error_ms"):
                if row[side][name] is not None:
                    board.add_scalar(f"noise_{name}/{row['noise']}_{side}", row[side][name], round(row["snr_db"]))
    board.add_text("tables", f"```\n{text}\n```", 0)
    for path in drawn:
        board.add_image(path.stem, np.asarray(Image.open(path).convert("RGB")), 0, dataformats="HWC")
    board.close()


def _codes(codes: dict) -> list[str]:
    return [
        f"codes: {codes['used']:,} of {codes['codes']:,} used, {codes['dead']:,} dead; perplexity {codes['perplexity']:.1f} (entropy "
        f"{codes['entropy_bits']:.2f} bits); {codes['bits_per_second']:.0f} bits/s, {codes['entropy_bits_per_second']:.0f} by entropy"
    ]


def _groups(results: dict) -> list[str]:
    rows = [["reconstruction", "ECGs", *COLUMNS, "codes used", "perplexity"]]
    for groups in ({"all": results["all"]}, results["by_superclass"], results["by_label"]):
        for name, group in groups.items():
            rows.append([name, group["ecgs"], *_figures(group), group["codes"]["used"], _number(group["codes"]["perplexity"], 0)])
    lines, first, second = _aligned(rows), 2, 2 + len(results["by_superclass"])
    if not results["by_label"]:
        return [*lines, "no labels in the manifest: no figures by diagnosis"]
    return [*lines[:first], "", *lines[first:second], *([""] if results["by_superclass"] else []), *lines[second:]]


def _bands(figures: dict) -> list[str]:
    rows = [["band", "% of the energy", "error % of it", "part of MSE"]]
    for name, mse in figures["band_mse"].items():
        rows.append([name, _percent(figures["band_energy"][name]), _percent(figures["band_error"][name]), _number(mse, 4)])
    correlations = "  ".join(f"{lead} {_number(r, 3)}" for lead, r in figures["correlation_by_lead"].items())
    return [*_aligned(rows), "", f"correlation: {correlations}"]


def _noise(results: dict) -> list[str]:
    if not results["noise"]:
        return []
    shown = [i for i, column in enumerate(COLUMNS) if column != "PRD %"]  # the root of MSE, and the table is wide
    rows = [["noise", "SNR dB", "tokens changed %", *(COLUMNS[i] for i in shown), "perplexity"]]
    for row in results["noise"]:
        clean = row["snr_db"] is None
        before, after = _figures(row["input"]), _figures(row["output"])
        figures = [after[i] if clean else f"{before[i]} > {after[i]}" for i in shown] + [_number(row["output"]["codes"]["perplexity"], 0)]
        rows.append([row["noise"], "" if clean else f"{row['snr_db']:g}", _percent(row["tokens_changed"]), *figures])
    note = f"{results['noise'][0]['output']['ecgs']} ECGs under noise, input > output. {results['noise_convention']}"
    return [*textwrap.wrap(note, 120), *_aligned(rows), ""]


def _diagnosis(found: dict) -> list[str]:
    if "skipped" in found:
        return [f"diagnostic information: not measured, {found['skipped']}"]
    names = list(found["drop"])
    rows = [["AUROC", *("macro" if name == "macro_auroc" else name for name in names)]]
    rows += [[kind, *(_number(found[kind][name], 3) for name in names)] for kind in ("originals", "reconstructions", "drop")]
    rows.append(["ECGs with it", "", *(found["cases"][name] for name in names[1:])])
    interval = found["drop_interval"]
    bounds = f"; 95 % interval of the macro drop, over patients: {interval[0]:+.3f} to {interval[1]:+.3f}" if interval else ""
    return [f"diagnostic information: fitted on {found['train_ecgs']:,}, judged on {found['ecgs']:,} ECGs{bounds}", *_aligned(rows)]


def _figures(group: dict) -> list[str]:
    return [
        _number(group["mse"], 3),
        _number(group["prd"], 1),
        _number(group["correlation"], 3),
        _number(group["r_error_ms"], 1),
        _number(group["qrs_error_ms"], 1),
        _percent(group["missed"]),
        _percent(group["extra"]),
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _aligned(rows: list[list]) -> list[str]:
    """First column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip() for row in cells]

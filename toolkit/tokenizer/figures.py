"""Pictures of a tokenizer's work: single ECGs on ECG paper, and a page of curves."""

import os

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from toolkit.ecg.plot import INK, RECONSTRUCTION, draw_ecg

COLOURS = ("#1673ff", "#d1495b", "#edae49", "#00798c", "#7b5ea7")
MARKERS = ("o-", "s-", "^-", "x--", "+:")  # curves that lie upon each other are still told apart


def cases(mse: np.ndarray, groups: dict[str, np.ndarray]) -> list[tuple[str, str, int]]:
    """(group, "median" or "worst", index) of the ECGs to show: by `mse` [N], of groups name -> bool [N]; nothing of a group without a finite mse.

    The median of an even number is the lower of the two in the middle.
    """
    found = []
    for name, member in groups.items():
        members = np.flatnonzero(member & np.isfinite(mse))
        order = members[np.argsort(mse[members], kind="stable")]
        if len(order):
            found += [(name, "median", int(order[(len(order) - 1) // 2])), (name, "worst", int(order[-1]))]
    return found


def draw_case(path: str | os.PathLike, title: str, ecg: np.ndarray, reconstruction: np.ndarray, ids: np.ndarray) -> None:
    """The original [12, 5000] with its reconstruction over it and the strip of token ids below."""
    z_scored = np.allclose(ecg.std(-1), 1, atol=0.01)  # upstream, as some published copies are: the scale is then no mV
    draw_ecg(ecg, path, title=title, reconstruction=reconstruction, tokens=ids, unit="SD" if z_scored else "mV")


def draw_overview(path: str | os.PathLike, counts: np.ndarray, bands: dict[str, float], noise: list[dict]) -> None:
    """Code usage by rank, the error's share of each band, and the error after the tokenizer against the error before it for each noise.

    `counts`: int [codes]; `bands`: name -> error energy / original's, or None; `noise`: the list of metrics.json, [] leaves its panel out.
    """
    figure = Figure(figsize=(15 if noise else 10, 4), layout="constrained")
    axes = figure.subplots(1, 3 if noise else 2)

    ranked = np.sort(counts)[::-1] / max(1, counts.sum())
    axes[0].plot(np.arange(1, len(ranked) + 1), np.where(ranked > 0, ranked, np.nan), color=RECONSTRUCTION)
    axes[0].axhline(1 / len(ranked), color=INK, linewidth=0.8, linestyle=":")
    axes[0].text(len(ranked), 1 / len(ranked), "all alike", va="bottom", ha="right", fontsize=8)
    _label(axes[0], f"{int((counts > 0).sum())} of {len(counts)} codes are used", "code, most frequent first", "share of all tokens")
    axes[0].set(yscale="log", xlim=(0, len(ranked) + 1))

    shares = [np.nan if value is None else 100 * value for value in bands.values()]
    bars = axes[1].bar(range(len(shares)), shares, color=RECONSTRUCTION)
    axes[1].bar_label(bars, ["" if np.isnan(share) else f"{share:.3g}" for share in shares], fontsize=8)
    axes[1].axhline(100, color=INK, linewidth=0.8, linestyle=":")
    axes[1].set_xticks(range(len(shares)), [name.removesuffix(" Hz") for name in bands], fontsize=8)
    _label(axes[1], "error in each band", "Hz (none: the originals have nothing there)", "error energy / original's, %")
    axes[1].set(yscale="log", ylim=(1, None))  # a band with little energy would flatten the others

    if noise:
        for kind, colour, marker in zip(dict.fromkeys(row["noise"] for row in noise if row["snr_db"] is not None), COLOURS, MARKERS):
            rows = sorted((row for row in noise if row["noise"] == kind), key=lambda row: row["snr_db"])
            axes[2].plot([row["snr_db"] for row in rows], [row["output"]["mse"] for row in rows], marker, color=colour, label=kind, markersize=4)
        snr = np.array(sorted({row["snr_db"] for row in noise if row["snr_db"] is not None}))
        axes[2].plot(snr, 10 ** (-snr / 10), color=INK, linestyle=":", label="input itself")
        clean = next(row["output"]["mse"] for row in noise if row["snr_db"] is None)
        axes[2].axhline(clean, color=INK, linewidth=0.8, label="clean input")
        axes[2].set(yscale="log", ylim=(clean / 3, None))
        axes[2].legend(fontsize=8)
        _label(axes[2], "reconstruction of a noisy ECG against the clean one", "SNR of the input, dB", "MSE, lead variances")
    canvas = FigureCanvasAgg(figure)
    canvas.print_png(path)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)

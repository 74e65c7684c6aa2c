"""A 12-lead ECG on ECG paper, true to scale: 25 mm/s, 10 mm/mV (or 2.5 mm/SD).

Standard 3x4 layout (2.5 s a column, columns consecutive in time) over a 10 s rhythm strip of lead II. The whole page is
one axes whose unit is the millimetre, so that the printed scale follows from the figure size alone.
"""

import os
from typing import IO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, hsv_to_rgb
from matplotlib.figure import Figure
from PIL import Image

from toolkit.ecg.leads import DURATION, LEADS, SAMPLES, SAMPLING_RATE

SPEED = 25  # mm/s
GAINS = {"mV": 10, "SD": 2.5}  # mm a unit; a lead's SD is about 0.2 mV, so z-scored beats then look as tall as in mV and fit their row
DPI = 101.6  # 4 pixels a millimetre: every grid line falls on a whole pixel, none looks thicker than its neighbour

# The page, mm. Every grid edge and baseline is a multiple of 5 mm, so it falls on a thick line.
WIDTH, HEIGHT = 280, 162
GRID = (5, 275, 10, 150)  # left, right, bottom, top
TRACE_LEFT = 20  # where t = 0 is drawn
BASELINES = (130, 95, 60, 25)  # three rows of four leads, then the rhythm strip
PULSE_LEFT = 10  # rising edge of the calibration pulse
PULSE_WIDTH = 5  # 0.2 s
# Rows are 35 mm apart, so a trace that is cut here stops 5 mm short of its neighbour's baseline.
CLIP = 30
STRIP = (1, 7)  # bottom and top of the token strip, between the grid and the line of text
STRIP_HEIGHT = 10  # by which it lengthens the page

ROWS = (("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"), ("II",))

PAPER, THIN_GRID, THICK_GRID = "#fffaf9", "#fbdcdc", "#f0aaae"
INK, RECONSTRUCTION, NOTE = "#1c1c22", "#1673ff", "#55555f"


def draw_ecg(
    ecg: np.ndarray,
    path_or_buffer: str | os.PathLike | IO[bytes],
    *,
    title: str = "",
    reconstruction: np.ndarray | None = None,
    tokens: np.ndarray | None = None,
    unit: str = "mV",
    format: str | None = None,
    dpi: float = DPI,
) -> None:
    """Draw `ecg` float [12, 5000] (leads in canonical order, 500 Hz) as PNG or SVG.

    `reconstruction` [12, 5000] in the same unit is laid over it as a thin coloured line. `tokens` uint16 [T] are drawn as T
    cells below the rhythm strip and in time with it: equal ids have equal colours, on every page. `unit` is "mV", or "SD" for
    z-scored data at 2.5 mm/SD, which the printed scale then says. `format` ("png", "svg") defaults to the suffix of a path and to
    PNG for a buffer. Deflections beyond 30 mm are cut and the leads concerned are named on the page; NaN leaves a gap.
    Raises ValueError on a wrong shape or unit.
    """
    traces = [(_checked(ecg, "ecg"), INK, 1.0)]
    if reconstruction is not None:
        traces.append((_checked(reconstruction, "reconstruction"), RECONSTRUCTION, 0.6))
    if unit not in GAINS:
        raise ValueError(f"unit is {unit!r}; use 'mV', or 'SD' for z-scored data")
    gain = GAINS[unit]

    bottom = 0 if tokens is None else -STRIP_HEIGHT
    figure = Figure(figsize=(WIDTH / 25.4, (HEIGHT - bottom) / 25.4), facecolor="white")
    page = figure.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, WIDTH), ylim=(bottom, HEIGHT))
    page.set_axis_off()

    _draw_grid(page)
    clipped = []
    for row_leads, baseline in zip(ROWS, BASELINES):
        _draw_pulse(page, baseline, gain)
        for column, lead in enumerate(row_leads):
            length = SAMPLES // len(row_leads)
            # One sample more than the column holds closes the gap to the next one.
            samples = np.arange(column * length, min((column + 1) * length + 1, SAMPLES))
            x = TRACE_LEFT + samples / SAMPLING_RATE * SPEED
            for order, (signal, colour, width) in enumerate(traces):
                y = signal[LEADS.index(lead), samples] * gain
                if lead not in clipped and np.any(np.abs(y) > CLIP):
                    clipped.append(lead)
                page.plot(x, baseline + np.clip(y, -CLIP, CLIP), color=colour, linewidth=width, zorder=3 + order)
            if column:
                page.plot([x[0]] * 2, [baseline - 3, baseline + 3], color=NOTE, linewidth=0.7, zorder=3)
            _write(page, x[0] + 1.2, baseline + 12, lead, weight="bold", size=9, box=True)

    if tokens is not None:
        _draw_tokens(page, np.asarray(tokens))
    footer = bottom + 5
    _write(page, GRID[0], GRID[3] + 6, title, weight="bold", size=10)
    _write(page, GRID[0], footer, f"{SPEED} mm/s   {gain} mm/{unit}   {DURATION} s at {SAMPLING_RATE} Hz", color=NOTE)
    if reconstruction is not None:
        _draw_legend(page, footer)
    if clipped:
        note = f"cut at ±{CLIP / gain:g} {unit}: {', '.join(clipped)}"
        _write(page, WIDTH / 2, footer, note, color="#b00020", align="center")

    _save(figure, path_or_buffer, format, dpi, colours=64 if tokens is None else 256)


def _checked(signal: np.ndarray, name: str) -> np.ndarray:
    signal = np.asarray(signal)
    if signal.shape != (len(LEADS), SAMPLES):
        raise ValueError(f"{name} has shape {signal.shape}; an ECG is [{len(LEADS)}, {SAMPLES}]")
    return signal


def _draw_grid(page: Axes) -> None:
    left, right, bottom, top = GRID
    page.fill([left, right, right, left], [bottom, bottom, top, top], color=PAPER, linewidth=0, zorder=0)
    for step, colour, width in ((1, THIN_GRID, 0.4), (5, THICK_GRID, 0.7)):
        lines = [[(x, bottom), (x, top)] for x in range(left, right + 1, step)]
        lines += [[(left, y), (right, y)] for y in range(bottom, top + 1, step)]
        page.add_collection(LineCollection(lines, colors=colour, linewidths=width, zorder=step / 10), autolim=False)


def _draw_pulse(page: Axes, baseline: float, gain: float) -> None:
    """The calibration pulse: 1 unit high, 0.2 s long (5 mm)."""
    up, down, high = PULSE_LEFT, PULSE_LEFT + PULSE_WIDTH, baseline + gain
    x = [up - 2, up, up, down, down, down + 2]
    y = [baseline, baseline, high, high, baseline, baseline]
    page.plot(x, y, color=INK, linewidth=0.9, solid_joinstyle="miter", zorder=3)


def _draw_tokens(page: Axes, tokens: np.ndarray) -> None:
    """One cell a token; the last one may end after the trace does: 313 tokens of 16 samples are 5,008."""
    if tokens.ndim != 1 or not len(tokens):
        raise ValueError(f"tokens has shape {tokens.shape}; the ids of one ECG are [T]")
    step = -(-SAMPLES // len(tokens)) / SAMPLING_RATE * SPEED
    edges = TRACE_LEFT + step * np.arange(len(tokens) + 1)
    # Golden-ratio hues: whatever ids a page holds lie far apart. Three shades tell hues that come close after all.
    ids = tokens.astype(np.int64)
    hsv = np.stack([ids * 0.618034 % 1, 0.35 + 0.3 * (ids % 2), 0.95 - 0.2 * (ids % 3)], -1)
    page.pcolormesh(edges, STRIP, np.arange(len(ids))[None], cmap=ListedColormap(hsv_to_rgb(hsv)), zorder=3)
    _write(page, GRID[0], sum(STRIP) / 2, "tokens", color=NOTE)


def _draw_legend(page: Axes, y: float) -> None:
    right = GRID[1]
    for x, name, colour in ((right - 62, "original", INK), (right - 34, "reconstruction", RECONSTRUCTION)):
        page.plot([x, x + 6], [y, y], color=colour, linewidth=1.4)
        _write(page, x + 7.5, y, name, color=NOTE)


def _write(page: Axes, x: float, y: float, text: str, *, color=INK, size=8, weight="normal", align="left", box=False):
    # A pale box, not an outline: the SVG backend turns outlined text into paths, which nobody can search.
    pale = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.8} if box else None
    # parse_math off: a "$" in a file name is no formula.
    page.text(
        x, y, text, color=color, fontsize=size, fontweight=weight, ha=align, va="center", bbox=pale, zorder=6,
        parse_math=False,
    )  # fmt: skip


def _save(figure: Figure, path_or_buffer: str | os.PathLike | IO[bytes], format: str | None, dpi: float, colours: int) -> None:
    if format is None:
        is_path = isinstance(path_or_buffer, (str, os.PathLike))
        format = os.path.splitext(path_or_buffer)[1].lstrip(".").lower() if is_path else "png"
    if format not in ("png", "svg"):
        raise ValueError(f"cannot draw an ECG as {format!r}; name the file .png or .svg, or pass format=")
    if format == "svg":
        # Text stays text; a fixed salt and no date make equal ECGs equal files.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "heartspeed"}):
            figure.savefig(path_or_buffer, format="svg", metadata={"Date": None})
        return
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    # 64 colours hold the grid, the ink and its edges: 35 kB where 24 bits take 130 kB, and a report holds a dozen. A token strip needs more.
    image = image.quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(path_or_buffer, format="png", optimize=True, dpi=(dpi, dpi))

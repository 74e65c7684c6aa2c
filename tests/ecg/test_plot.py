"""The paper must be true to scale: the distances are measured in the pixels of the picture."""

import io
import re
import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from toolkit.ecg.leads import LEADS
from toolkit.ecg.plot import draw_ecg

PIXELS = 4  # a millimetre, at the default resolution


def flat() -> np.ndarray:
    return np.zeros((12, 5000), np.float32)


def picture(ecg, **options) -> np.ndarray:
    buffer = io.BytesIO()
    draw_ecg(ecg, buffer, **options)
    return np.asarray(Image.open(buffer).convert("RGB")).astype(int)


def svg(ecg, **options) -> str:
    buffer = io.BytesIO()
    draw_ecg(ecg, buffer, format="svg", **options)
    return buffer.getvalue().decode()


def texts(source: str) -> list[str]:
    return [node.text for node in ElementTree.fromstring(source).iter("{http://www.w3.org/2000/svg}text")]


def noisy(seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((12, 5000)).astype(np.float32)


def ink(image) -> np.ndarray:
    return image.max(axis=2) < 100


def blue(image) -> np.ndarray:
    return (image[..., 2] > image[..., 0] + 60) & (image[..., 2] > 150)


def test_the_page_has_its_physical_size():
    buffer = io.BytesIO()
    draw_ecg(flat(), buffer)
    image = Image.open(buffer)
    assert image.size == (280 * PIXELS, 162 * PIXELS)
    assert image.info["dpi"] == pytest.approx((101.6, 101.6), abs=0.1)
    width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg(flat())).groups()
    assert float(width) / 72 * 25.4 == pytest.approx(280) and float(height) / 72 * 25.4 == pytest.approx(162)


def test_calibration_pulse_is_one_millivolt_high_and_a_fifth_of_a_second_wide():
    """The left margin of the rhythm strip holds nothing dark but the pulse."""
    margin = ink(picture(flat()))[-50 * PIXELS : -20 * PIXELS, 6 * PIXELS : 18 * PIXELS]
    per_row = margin.sum(axis=1)
    top, baseline = (rows := np.flatnonzero(per_row > 10))[0], rows[-1]
    assert baseline - top == pytest.approx(10 * PIXELS, abs=1)  # 10 mm/mV
    edges = np.flatnonzero(margin[top + 5 : baseline - 5].all(axis=0))
    assert edges[-1] - edges[0] == pytest.approx(5 * PIXELS, abs=1)  # 0.2 s at 25 mm/s


@pytest.mark.parametrize("seconds", [1, 4])
def test_a_second_is_25_mm_in_the_rhythm_strip(seconds):
    ecg = flat()
    for start in (3 * 500, (3 + seconds) * 500):
        ecg[LEADS.index("II"), start : start + 11] = 1.5  # 20 ms, 2 pixels
    # 1.1 to 1.5 mV, from t = 0.4 s on: the lead's name stands before.
    strip = ink(picture(ecg))[-40 * PIXELS : -36 * PIXELS, 30 * PIXELS : 270 * PIXELS]
    columns = np.flatnonzero(strip.any(axis=0))
    spikes = np.split(columns, np.flatnonzero(np.diff(columns) > 5) + 1)
    assert len(spikes) == 2
    assert np.mean(spikes[1]) - np.mean(spikes[0]) == pytest.approx(25 * seconds * PIXELS, abs=1)
    assert np.mean(spikes[0]) == pytest.approx(65.25 * PIXELS, abs=1)


def test_a_trace_has_the_scale_of_the_pulse():
    ecg = flat()
    ecg[LEADS.index("II")] = 1.0
    image = ink(picture(ecg))
    trace = image[-50 * PIXELS : -20 * PIXELS, 100 * PIXELS : 200 * PIXELS].sum(axis=1).argmax()
    pulse = image[-50 * PIXELS : -20 * PIXELS, 11 * PIXELS : 14 * PIXELS].sum(axis=1).argmax()
    assert abs(trace - pulse) <= 1


def test_thick_grid_lines_are_5_mm_apart_and_thin_ones_1_mm():
    row = picture(flat())[-15 * PIXELS + 2, 5 * PIXELS - 1 : 275 * PIXELS + 2, 1]
    dips = [i for i in range(1, len(row) - 1) if row[i] < 250 and row[i] <= row[i - 1] and row[i] < row[i + 1]]
    darkest = row[dips].min()
    thick = [i for i in dips if row[i] < darkest + 15]
    assert set(np.diff(thick)) == {5 * PIXELS} and set(np.diff(dips)) == {PIXELS}


@pytest.mark.parametrize("lead", range(12))
def test_every_lead_is_drawn_in_its_own_cell(lead):
    ecg = flat()
    ecg[lead] = 0.8
    changed = ink(picture(ecg)) != ink(picture(flat()))
    row, column = lead % 3, lead // 3
    top, left = (12 + 35 * row) * PIXELS, (20 + 62.5 * column) * PIXELS
    cell = changed[top : top + 35 * PIXELS, int(left) : int(left + 62.5 * PIXELS)]
    assert cell.sum() > 62 * PIXELS
    elsewhere = changed.sum() - cell.sum()
    assert elsewhere > 900 if lead == 1 else elsewhere < 40  # lead II again in the rhythm strip


def test_every_lead_the_scale_and_the_title_are_readable_text():
    shown = texts(svg(flat(), title="record $5 <1>"))
    assert set(LEADS) <= set(shown) and shown.count("II") == 2
    assert "record $5 <1>" in shown
    assert any("25 mm/s" in text and "10 mm/mV" in text for text in shown)
    assert any("2.5 mm/SD" in text for text in texts(svg(flat(), unit="SD")))
    assert "mm/mV" not in svg(flat(), unit="SD")


def test_reconstruction_is_coloured_and_named():
    image = picture(flat(), reconstruction=flat() + 0.5)
    assert blue(image).sum() > 1000 and not blue(picture(flat())).any()
    shown = texts(svg(flat(), reconstruction=flat()))
    assert {"original", "reconstruction"} <= set(shown) and "reconstruction" not in texts(svg(flat()))


def test_a_standard_deviation_is_a_quarter_of_a_millivolt_high():
    ecg = flat()
    ecg[LEADS.index("II")] = 4.0
    band = np.s_[-50 * PIXELS : -20 * PIXELS, 100 * PIXELS : 200 * PIXELS]
    heights = [ink(picture(signal, unit=unit))[band].sum(axis=1).argmax() for signal, unit in ((ecg, "SD"), (ecg / 4, "mV"))]
    assert heights[0] == heights[1]


def strip(tokens) -> np.ndarray:
    """The row of pixels through the middle of the token strip, 4 mm above the bottom of the grid's page, from t = 0 on."""
    image = picture(flat(), tokens=np.asarray(tokens, np.uint16))
    assert image.shape == ((162 + 10) * PIXELS, 280 * PIXELS, 3)
    return image[-(10 + 4) * PIXELS, 20 * PIXELS :]


def test_tokens_stand_below_the_trace_in_time_with_it():
    """Token 100 of 313 covers 3.200 to 3.232 s: 80.0 to 80.8 mm after t = 0."""
    tokens = np.zeros(313, int)
    tokens[100], tokens[250:] = 7, 7
    row = strip(tokens)
    other = np.abs(row - row[0]).sum(axis=1) > 60
    cell = np.flatnonzero(other[: 150 * PIXELS])
    assert cell.min() == pytest.approx(80 * PIXELS, abs=1) and cell.max() == pytest.approx(80.8 * PIXELS - 1, abs=1)
    assert np.flatnonzero(other[150 * PIXELS :]).min() == pytest.approx(50 * PIXELS, abs=1)
    assert other[int(200.5 * PIXELS) : 250 * PIXELS].all()
    assert (row[int(250.4 * PIXELS) + 1 :] == 255).all()  # white margin after 313 * 16 = 5,008 samples


def test_equal_tokens_have_equal_colours_on_every_page_and_neighbours_do_not():
    def colours(*tokens):
        row = strip(np.repeat(tokens, 100))
        return [row[int((i + 0.5) * 250 / len(tokens) * PIXELS)] for i in range(len(tokens))]

    assert np.abs(np.subtract(colours(5, 900), colours(5, 3, 900)[::2])).max() <= 6  # the picture's palette rounds
    first = colours(*range(640, 650))
    assert min(np.abs(a - b).sum() for i, a in enumerate(first) for b in first[:i]) > 40


def test_absurd_amplitudes_are_cut_before_the_next_row_and_named():
    ecg = flat()
    ecg[LEADS.index("aVL")] = 500 * noisy()[0]
    ecg[LEADS.index("V6"), 2000:] = -1e9
    image = ink(picture(ecg))
    for baseline in (130, 60, 25):  # the neighbours' traces still run alone over their whole length
        band = image[(162 - baseline) * PIXELS - 4 : (162 - baseline) * PIXELS + 4, 85 * PIXELS : 140 * PIXELS]
        assert band.any(axis=0).all() and band.mean() < 0.5
    assert "cut at ±3 mV: aVL, V6" in texts(svg(ecg))
    assert "cut" not in svg(flat() + 2.9)


def test_gaps_and_infinities_do_not_stop_the_drawing():
    ecg = noisy()
    ecg[0] = np.nan
    ecg[1, 100:200] = np.inf
    assert "cut at" in svg(ecg)
    assert picture(ecg).shape == (648, 1120, 3)


def test_paths_choose_the_format_and_files_are_compact_fast_and_repeatable(tmp_path):
    draw_ecg(noisy(), tmp_path / "warm.png")
    start = time.perf_counter()
    draw_ecg(noisy(), tmp_path / "ecg.png", reconstruction=noisy(1), title="noise, the worst case for PNG")
    assert time.perf_counter() - start < 1.5
    assert (tmp_path / "ecg.png").stat().st_size < 150_000
    for name in ("one.svg", "two.svg", "one.png", "two.png"):
        draw_ecg(noisy(), str(tmp_path / name))
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "arguments, mend",
    [
        (dict(ecg=np.zeros((12, 1000))), r"ecg has shape \(12, 1000\)"),
        (dict(ecg=flat(), reconstruction=flat().T), "reconstruction has shape"),
        (dict(ecg=flat(), tokens=np.zeros((2, 313))), r"tokens has shape \(2, 313\)"),
        (dict(ecg=flat(), unit="uV"), "'mV', or 'SD'"),
        (dict(ecg=flat(), format="gif"), "'gif'.*png or .svg"),
    ],
)
def test_wrong_input_is_named(arguments, mend):
    with pytest.raises(ValueError, match=mend):
        draw_ecg(path_or_buffer=io.BytesIO(), **arguments)

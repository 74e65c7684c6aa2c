"""Peaks and QRS durations against the truth of synthetic hearts, and against wfdb's detector on real ones."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wfdb.processing import XQRS

from toolkit.ecg.beats import compare_beats, qrs_durations, r_peaks
from toolkit.ecg.heart import _beats, draw, simulate
from toolkit.ecg.noise import NOISES, add_noise
from toolkit.ecg.quality import read_checked
from toolkit.errors import UserError

RATES = {"bradycardia": 45, "tachycardia": 125, "fibrillation": 90}
# Summits of the QRS in ms after the heart's R time: one of a narrow QRS, two humps of LBBB, R and R' of RBBB (toolkit.ecg.heart._waves).
SUMMITS = {"none": [0], "first_degree": [0], "lbbb": [-18, 36], "rbbb": [0, 66], "ventricular": [-10, 55]}


def hearts(count=12, **labels):
    """(ECG, sample and kind of every beat away from the ends) of hearts with the given labels and else normal."""
    for i in range(count):
        clean = {"rhythm": "sinus", "conduction": "none", "morphology": "none", "ectopy": "none", "axis": "normal", "ratio": 4, "axis_degrees": 45.0}
        clean |= {"rate": RATES.get(labels.get("rhythm"), 75), "pr": 0.15, "modulation": 0.015, "ectopics": 2 if "ectopy" in labels else 0} | labels
        heart = replace(draw(np.random.default_rng([20, i])), **clean)
        times, kinds = _beats(heart, np.random.default_rng([21, i]))
        inside = (times > 0.2) & (times < 9.8)
        yield simulate(heart, np.random.default_rng([21, i])), times[inside] * 500, kinds[inside]


def ecg(i=0, **labels) -> np.ndarray:
    return list(hearts(i + 1, **labels))[i][0]


@pytest.mark.parametrize("labels", [
    {}, {"rhythm": "bradycardia"}, {"rhythm": "tachycardia"}, {"rhythm": "arrhythmia"}, {"rhythm": "fibrillation"}, {"rhythm": "flutter"},
    {"conduction": "first_degree"}, {"conduction": "lbbb"}, {"conduction": "rbbb"}, {"ectopy": "ventricular"}, {"ectopy": "atrial"},
    {"morphology": "lvh"}, {"morphology": "t_inversion"}, {"axis": "left", "axis_degrees": -50.0},
], ids=str)  # fmt: skip
def test_peaks_lie_within_20_ms_of_the_truth(labels):
    beats = late = extra = 0
    for signal, times, kinds in hearts(40, **labels):
        peaks = r_peaks(signal)
        assert peaks.dtype == np.int64 and (np.diff(peaks) > 0).all()
        summits = [time + np.array(SUMMITS["ventricular" if kind == "v" else labels.get("conduction", "none")]) / 2 for time, kind in zip(times, kinds)]
        beats += len(times)
        late += sum(np.abs(peaks[:, None] - summit).min() > 10 for summit in summits)
        extra += sum(np.abs(peak - np.concatenate(summits)).min() > 10 for peak in peaks if 150 < peak < 4850)
    assert beats > 200 and late <= 0.01 * beats and extra <= 0.01 * beats


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 3), st.floats(0.1, 50), st.floats(-5, 5))
def test_unit_and_offset_do_not_matter(i, scale, offset):
    signal = ecg(i)
    other = (signal * scale + offset).astype(np.float32)
    np.testing.assert_allclose(r_peaks(other), r_peaks(signal), atol=1)
    np.testing.assert_allclose(qrs_durations(other, r_peaks(signal)), qrs_durations(signal, r_peaks(signal)), atol=4)


def test_z_scored_leads_have_the_same_peaks():
    for signal, *_ in hearts(6):
        scored = (signal - signal.mean(axis=1, keepdims=True)) / signal.std(axis=1, keepdims=True)
        compared = compare_beats(signal, scored)
        assert compared["missed"] == compared["extra"] == 0 and compared["r_error_ms"] < 4


def test_bad_leads_are_outvoted():
    signal = ecg()
    bad = signal.copy()
    bad[2], bad[5] = 0, 0.3
    bad[7, 1000:1004] += 12  # a spike
    bad[9] = 2 * np.random.default_rng(0).standard_normal(5000)
    compared = compare_beats(signal, bad)
    assert compared["beats"] > 10 and compared["missed"] == compared["extra"] == 0


def test_wide_qrs_is_measured_wider():
    def medians(**labels):
        return [np.nanmedian(qrs_durations(signal, r_peaks(signal))) for signal, *_ in hearts(**labels)]

    narrow = medians()
    assert 90 < np.median(narrow) < 125  # q at -28 ms to s at 28 ms, each a Gaussian of 9-10 ms: 104 ms between 2.5 sigma
    for conduction in ("lbbb", "rbbb"):  # 146 and 171 ms between 2.5 sigma, and LBBB's ST begins before its QRS ends
        wide = medians(conduction=conduction)
        assert min(wide) > max(narrow) + 10 and 135 < np.median(wide) < 210


def test_ventricular_beats_are_the_wide_ones():
    sinus, ventricular = [], []
    for signal, times, kinds in hearts(ectopy="ventricular"):
        peaks = r_peaks(signal)
        widths = qrs_durations(signal, peaks)
        nearest = np.abs(times[:, None] + 10 - peaks).argmin(axis=1)
        sinus.extend(widths[nearest[kinds == "s"]])
        ventricular.extend(widths[nearest[kinds == "v"]])
    assert np.nanmedian(ventricular) > np.nanmedian(sinus) + 50


def test_an_ecg_against_itself_has_no_error():
    for signal, times, _ in hearts(3):
        same = compare_beats(signal, signal)
        assert same == {"beats": len(r_peaks(signal)), "missed": 0, "extra": 0, "r_error_ms": 0, "qrs_error_ms": 0}
        assert len(times) <= same["beats"] <= len(times) + 2


# No beat within 0.2 s of the ends, so that none falls into the seam when the ECG is rolled.
CALM_ENDS = [signal for signal, times, _ in hearts(25) if len(times) == len(r_peaks(signal)) and times[0] > 150 and times[-1] < 4850]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 4), st.integers(-37, 37))
def test_a_shifted_ecg_is_off_by_the_shift(i, shift):
    compared = compare_beats(CALM_ENDS[i], np.roll(CALM_ENDS[i], shift, axis=1))
    assert compared["missed"] == compared["extra"] == 0
    assert compared["r_error_ms"] == pytest.approx(2 * abs(shift), abs=1)
    assert compared["qrs_error_ms"] <= 4


def test_a_shift_beyond_75_ms_matches_nothing():
    signal = ecg()
    compared = compare_beats(signal, np.roll(signal, 45, axis=1))
    assert compared["missed"] >= compared["beats"] - 1 > 5 and compared["extra"] >= compared["beats"] - 2


def test_lost_and_added_beats_are_counted():
    signal = ecg()
    peaks = r_peaks(signal)
    gone = signal.copy()
    for peak in peaks[3:5]:
        gone[:, peak - 60 : peak + 60] = np.linspace(gone[:, peak - 60], gone[:, peak + 60], 120).T
    assert (compare_beats(signal, gone)["missed"], compare_beats(signal, gone)["extra"]) == (2, 0)
    assert (compare_beats(gone, signal)["missed"], compare_beats(gone, signal)["extra"]) == (0, 2)


def test_a_stretched_qrs_is_longer():
    """The same beats at half the speed: twice the QRS duration."""
    signal = ecg()
    slow = np.stack([np.interp(np.arange(5000) / 2, np.arange(5000), lead) for lead in signal]).astype(np.float32)
    once, twice = (np.nanmedian(qrs_durations(x, r_peaks(x))) for x in (signal, slow))
    assert twice == pytest.approx(2 * once, rel=0.15)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3])
def test_without_beats_nothing_is_measured(value):
    flat = np.full((12, 5000), value, np.float32)
    assert len(r_peaks(flat)) == 0 and len(qrs_durations(flat, r_peaks(flat))) == 0
    compared = compare_beats(ecg(), flat)
    assert compared["beats"] == compared["missed"] > 5 and compared["extra"] == 0
    assert np.isnan(compared["r_error_ms"]) and np.isnan(compared["qrs_error_ms"])
    assert compare_beats(flat, ecg())["extra"] == compared["beats"]


def test_a_drowned_qrs_has_no_duration():
    noise = np.random.default_rng(0).standard_normal((12, 5000)).astype(np.float32)
    signal = ecg()
    peaks = r_peaks(signal)
    assert np.isnan(qrs_durations(signal + 3 * noise, peaks)).mean() > 0.5 > np.isnan(qrs_durations(signal, peaks)).mean()


@pytest.mark.parametrize("array", [np.zeros((11, 5000), np.float32), np.zeros((12, 100), np.float32), np.full((12, 5000), np.nan, np.float32)])
def test_mistakes_are_named(array):
    for call in (r_peaks, lambda x: qrs_durations(x, np.array([200])), lambda x: compare_beats(ecg(), x)):
        with pytest.raises(UserError, match="ecg of shape"):
            call(array)


@pytest.mark.parametrize("kind", NOISES)
def test_mild_noise_moves_the_beats_of_real_ecgs_little(ecg_data, kind):
    errors = []
    for i, path in enumerate(sorted((ecg_data / "ptbxl_mv").rglob("*.hea"))[:20]):
        signal, _ = read_checked(path.with_suffix(""))
        errors.append(compare_beats(signal, add_noise(signal, kind, 18, np.random.default_rng(i))))
    beats = sum(error["beats"] for error in errors)
    assert beats > 150 and sum(error["missed"] + error["extra"] for error in errors) <= 0.01 * beats
    assert np.mean([error["r_error_ms"] for error in errors]) < 2 and np.mean([error["qrs_error_ms"] for error in errors]) < 4


def test_real_peaks_agree_with_xqrs(ecg_data):
    """Sensitivity and precision within 75 ms against wfdb's detector on lead II, which may lack the first beat."""
    ours = theirs = found = confirmed = 0
    for path in sorted((ecg_data / "ptbxl_mv").rglob("*.hea"))[:20]:
        signal, _ = read_checked(path.with_suffix(""))
        detector = XQRS(sig=signal[1].astype(float), fs=500)
        detector.detect(verbose=False)
        reference, peaks = np.asarray(detector.qrs_inds), r_peaks(signal)
        inner = peaks[(peaks > 500) & (peaks < 4900)]
        away = np.abs(reference[:, None] - peaks)
        ours, theirs = ours + len(inner), theirs + len(reference)
        found += (away.min(axis=1) <= 37).sum()
        confirmed += (np.abs(inner[:, None] - reference).min(axis=1) <= 37).sum()
    assert theirs > 150 and found >= 0.99 * theirs and confirmed >= 0.95 * ours

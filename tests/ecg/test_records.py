import os
import pickle
import shutil
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import resample_poly

from toolkit.ecg.leads import LEADS, SAMPLES
from toolkit.ecg.records import RecordError, read_leads, read_record, windows

DATA = Path(os.environ.get("ECG_DATA", Path(__file__).parents[2] / "../shared/data"))
STEP = 0.001  # mV: one ADC unit at gain 1000


def waves(seconds=10.0, rate=500, seed=0):
    """[12, n] mV: slow sines, a different one a lead, so that leads cannot be confused and resampling is exact but for its filter."""
    at = np.arange(round(seconds * rate)) / rate
    phase = np.random.default_rng(seed).uniform(0, 6, 12)
    return np.array([(0.5 + 0.1 * i) * np.sin(2 * np.pi * (1 + i) * at + phase[i]) for i in range(12)])


def write(folder, signal, names=LEADS, rate=500, units="mV", gain=1000.0, name="rec"):
    n = len(signal)
    wfdb.wrsamp(
        name, fs=rate, units=[units] * n, sig_name=list(names), p_signal=signal.T, fmt=["16"] * n, adc_gain=[gain] * n,
        baseline=[0] * n, write_dir=str(folder),
    )  # fmt: skip
    return str(Path(folder) / name)


def reason(path):
    with pytest.raises(RecordError) as caught:
        read_record(path)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_plain_record_as_wfdb_reads_it(tmp_path):
    path = write(tmp_path, waves())
    ecg = read_record(path)
    assert ecg.dtype == np.float32 and ecg.shape == (12, SAMPLES)
    np.testing.assert_array_equal(ecg, wfdb.rdsamp(path)[0].T.astype(np.float32))
    np.testing.assert_allclose(ecg, waves(), atol=STEP)
    for suffix in (".hea", ".dat"):
        np.testing.assert_array_equal(read_record(Path(path + suffix)), ecg)


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(12)), st.lists(st.sampled_from([str, str.upper, str.lower]), min_size=12, max_size=12), st.booleans())
def test_any_order_and_case_of_leads_is_the_same_ecg(order, cases, extra):
    names, signal = [cases[i](LEADS[i]) for i in order], waves()[list(order)]
    if extra:
        names, signal = ["Vx", *names], np.concatenate([np.full((1, SAMPLES), 9.0), signal])
    with tempfile.TemporaryDirectory() as folder:
        np.testing.assert_allclose(read_record(write(folder, signal, names)), waves(), atol=STEP)


@pytest.mark.parametrize(("unit", "per_mv"), [("mV", 1), ("mv", 1), ("uV", 1e3), ("UV", 1e3), ("V", 1e-3), ("nV", 1e6), ("NU", 1)])
def test_units_become_millivolts(tmp_path, unit, per_mv):
    path = write(tmp_path, waves() * per_mv, units=unit, gain=1000 / per_mv)
    np.testing.assert_allclose(read_record(path), waves(), atol=STEP)


@pytest.mark.parametrize("rate", [100, 250, 257, 360, 1000, 128.5])
def test_other_rates_are_resampled(tmp_path, rate):
    """The sines at 500 Hz are known in closed form. At the very ends the filter has no samples: 0.2 s are spared there."""
    ecg = read_record(write(tmp_path, waves(rate=rate), rate=rate))
    at = np.arange(SAMPLES) / 500
    inside = (at > 0.2) & (at < 9.8)
    np.testing.assert_allclose(ecg[:, inside], waves()[:, inside], atol=0.01)


def test_resampling_keeps_an_offset_up_to_the_ends(tmp_path):
    ecg = read_record(write(tmp_path, np.full((12, 1000), 2.0), rate=100))
    np.testing.assert_allclose(ecg, 2.0, atol=0.005)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([100, 250, 257, 360, 1000, 128.5, 499.87, 977]), st.floats(0, 32), st.booleans())
def test_a_window_is_that_of_the_whole_record_resampled(rate, start, gap):
    """Noise, so that every sample counts; the whole is resampled by scipy, from the same digital values. A gap elsewhere changes nothing."""
    signal = np.random.default_rng(1).normal(0, 0.5, (12, int(40 * rate)))
    begin = round(start * 500)
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, signal, rate=rate)
        ratio = Fraction(500) / Fraction(str(rate))
        whole = resample_poly(wfdb.rdrecord(path).p_signal.T, ratio.numerator, ratio.denominator, axis=1, padtype="edge")[:, begin : begin + SAMPLES]
        if gap:
            before = int((start - 1) * rate)
            signal[4, : max(before, 0)] = np.nan
            path = write(folder, signal, rate=rate)
        np.testing.assert_allclose(read_record(path, start)[:, : whole.shape[1]], whole, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40_000), st.sampled_from([100, 250, 257, 500, 1000]))
def test_windows_by_counting(samples, rate):
    """Against a walk through the record; every window can be read where the record has 5 s."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "rec")
        Path(path + ".hea").write_text(f"rec 12 {rate} {samples}\n" + "".join(f"rec.dat 16 1000(0)/mV 16 0 0 0 0 {lead}\n" for lead in LEADS))
        seconds = Fraction(samples, rate)
        expected = [10.0 * i for i in range(1000) if seconds - 10 * i >= 5]
        every, (middle,) = windows(path, "all"), windows(path + ".hea", "middle")
        assert every == (expected or [0.0])
        assert windows(path, "first") == [0.0]
        assert middle == pytest.approx(max(0.0, float(seconds - 10) / 2), abs=0.002) and middle * 500 == pytest.approx(round(middle * 500))
        Path(path + ".dat").write_bytes(bytes(24 * samples))
        for start in [*every, middle]:
            if expected:
                assert read_record(path, start).shape == (12, SAMPLES)
            else:
                assert reason(path) == "too_short"


def test_windows_lie_where_they_say(tmp_path):
    long = waves(seconds=36)
    path = write(tmp_path, long)
    assert windows(path, "first") == [0.0] and windows(path, "middle") == [13.0] and windows(path, "all") == [0.0, 10.0, 20.0, 30.0]
    for start in (0.0, 13.0, 20.0, 1.2345):
        first = round(start * 500)
        np.testing.assert_allclose(read_record(path, start), long[:, first : first + SAMPLES], atol=STEP)
    last = read_record(path, 30.0)
    np.testing.assert_allclose(last[:, :3000], long[:, 15000:], atol=STEP)
    assert not last[:, 3000:].any()
    assert windows(write(tmp_path, waves(seconds=34.9), name="short"), "all") == [0.0, 10.0, 20.0]
    for start, why in ((31.01, "too_short"), (36.0, "too_short"), (1e8, "too_short"), (-0.1, "unreadable"), (np.nan, "unreadable"), (np.inf, "unreadable")):
        with pytest.raises(RecordError) as caught:
            read_record(path, start)
        assert caught.value.reason == why, start
    with pytest.raises(RecordError):
        windows(tmp_path / "absent", "all")


def test_missing_leads_are_zeros_and_named(tmp_path):
    path = write(tmp_path, waves()[[0, 6]], ["I", "V1"])
    ecg, missing, _ = read_leads(path)
    assert missing == [lead for lead in LEADS if lead not in ("I", "V1")]
    np.testing.assert_allclose(ecg[[0, 6]], waves()[[0, 6]], atol=STEP)
    assert not np.delete(ecg, [0, 6], axis=0).any()
    with pytest.raises(RecordError, match="no lead I, II"):  # none of the twelve
        read_leads(write(tmp_path, waves()[:2], ["MLII", "Resp"], name="none"))


def test_names_real_files_use(tmp_path):
    names = ["DI", "Lead II", "ECG III", "ekg_avr", "ECG Lead aVL", "lead_avf", *(f"lead {lead}" for lead in LEADS[6:])]
    np.testing.assert_allclose(read_record(write(tmp_path, waves(), names)), waves(), atol=STEP)
    for other in ("MLII", "II modified", "-II", "ECG -II", "ECG"):
        path = write(tmp_path, waves(), ["I", other, "III", *LEADS[3:]], name="other")
        assert reason(path) == "missing_lead"


def test_impossible_rates_are_unreadable(tmp_path):
    path = Path(write(tmp_path, waves()))
    text = path.with_suffix(".hea").read_text()
    for rate in ("0", "24.9", "100001", "999999999"):
        path.with_suffix(".hea").write_text(text.replace(" 500 5000", f" {rate} 5000"))
        assert reason(path) == "unreadable"


def test_longer_is_cut_shorter_is_padded_with_zeros(tmp_path):
    long = read_record(write(tmp_path, waves(seconds=30), name="long"))
    np.testing.assert_allclose(long, waves(), atol=STEP)
    half = read_record(write(tmp_path, waves(seconds=5), name="half"))
    np.testing.assert_allclose(half[:, :2500], waves(seconds=5), atol=STEP)
    assert not half[:, 2500:].any()
    slow = read_record(write(tmp_path, waves(seconds=12, rate=100), rate=100, name="slow"))
    np.testing.assert_allclose(slow[:, 100:], waves()[:, 100:], atol=0.01)  # up to the cut: the filter saw what lies behind it
    assert reason(write(tmp_path, waves(seconds=4.99), name="short")) == "too_short"


def test_nan_stays_where_it_is(tmp_path):
    signal = waves()
    signal[3, 100:107] = np.nan
    ecg = read_record(write(tmp_path, signal))
    np.testing.assert_array_equal(np.isnan(ecg), np.isnan(signal))

    slow = waves(rate=100)
    slow[3, 200] = slow[5] = np.nan
    ecg = read_record(write(tmp_path, slow, rate=100, name="slow"))
    assert np.isnan(ecg[5]).all() and not np.isnan(np.delete(ecg, [3, 5], axis=0)).any()
    assert set(np.flatnonzero(np.isnan(ecg[3]))) == set(range(998, 1003))  # the five samples of 500 Hz next to it, not the filter's 100


def test_unusable_records_say_why(tmp_path):
    assert reason(write(tmp_path, waves()[:11], LEADS[:11], name="no_v6")) == "missing_lead"
    assert reason(tmp_path / "absent") == "absent"

    path = Path(write(tmp_path, waves()))
    header, data = path.with_suffix(".hea").read_text(), path.with_suffix(".dat").read_bytes()
    for cut in (0, 60_000, len(data) - 1):
        path.with_suffix(".dat").write_bytes(data[:cut])
        assert reason(path) == "unreadable"
    path.with_suffix(".dat").unlink()
    assert reason(path) == "absent"
    path.with_suffix(".dat").symlink_to(path.with_suffix(".dat"))
    with pytest.raises(OSError, match="symbolic links"):  # the machine's fault, not the record's: whoever reads an archive must stop
        read_record(path)
    path.with_suffix(".dat").unlink()
    path.with_suffix(".dat").write_bytes(data)
    for broken in ("", "\0\0 nothing\n", header.replace(" 500 5000", " 0 5000"), header.replace("rec.dat 16", "rec.dat 999"), header[:80]):
        path.with_suffix(".hea").write_text(broken)
        assert reason(path) == "unreadable", broken


def test_record_error_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(RecordError("nan", "why")))
    assert (error.reason, error.message, str(error)) == ("nan", "why", "why")


@pytest.mark.parametrize("folder", ["ptbxl", "ptbxl_mv", "cinc2021/georgia", "cinc2021/ningbo"])
def test_shared_data_as_wfdb_reads_it(folder, tmp_path):
    headers = sorted(DATA.glob(f"{folder}/**/*.hea"))[:4]
    if not headers:
        pytest.skip(f"no records in {DATA / folder}: set ECG_DATA")
    for header in headers:
        signal, fields = wfdb.rdsamp(str(header.with_suffix("")))
        where = {name.upper(): i for i, name in enumerate(fields["sig_name"])}
        expected = np.stack([signal[:, where[lead.upper()]] for lead in LEADS])
        np.testing.assert_array_equal(read_record(header), expected.astype(np.float32))


def test_truncated_flac_is_unreadable(tmp_path):
    header = next(DATA.glob("ptbxl_mv/**/*.hea"), None)
    if header is None:
        pytest.skip(f"no records in {DATA / 'ptbxl_mv'}: set ECG_DATA")
    for file in header.parent.glob(f"{header.stem}*"):
        shutil.copyfile(file, tmp_path / file.name)
    part = next(tmp_path.glob("*_2.dat"))
    data = part.read_bytes()
    for cut in (0, 100, len(data) // 2, len(data) - 200):
        part.write_bytes(data[:cut])
        assert reason(tmp_path / header.stem) == "unreadable", cut

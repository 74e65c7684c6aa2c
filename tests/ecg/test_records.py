import os
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.ecg.leads import LEADS, SAMPLES
from toolkit.ecg.records import RecordError, read_record

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
    assert reason(tmp_path / "absent") == "unreadable"

    path = Path(write(tmp_path, waves()))
    header, data = path.with_suffix(".hea").read_text(), path.with_suffix(".dat").read_bytes()
    for cut in (0, 60_000, len(data) - 1):
        path.with_suffix(".dat").write_bytes(data[:cut])
        assert reason(path) == "unreadable"
    path.with_suffix(".dat").unlink()
    assert reason(path) == "unreadable"
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

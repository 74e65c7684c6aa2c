"""Arrays without a header: shapes, types, units, and what is refused."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import savemat

from toolkit.ecg.leads import LEADS, SAMPLES
from toolkit.ecg.records import RecordError, read_record, windows


def about(rate=500, unit="mV", leads=LEADS) -> str:
    return json.dumps({"sampling_rate": rate, "unit": unit, "leads": list(leads)})


def noise(samples=SAMPLES, leads=12) -> np.ndarray:
    return np.random.default_rng(0).integers(-2000, 2000, (leads, samples))


def refusal(path, array, start=0.0) -> str:
    with pytest.raises(RecordError) as caught:
        read_record(path, start, array)
    assert caught.value.reason == "unreadable" and str(path.parent) not in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_layout_type_unit_and_order_is_the_same_ecg(data):
    order = data.draw(st.permutations(range(12)))
    samples = data.draw(st.integers(2500, 7000))
    dtype = data.draw(st.sampled_from(["<i2", ">i2", "i4", "i8", "f4", "f8", ">f4"]))
    unit, scale = data.draw(st.sampled_from([("uV", 1e-3), ("mV", 1.0), ("NU", 1.0), ("V", 1e3)]))
    layout, suffix = data.draw(st.sampled_from([np.ascontiguousarray, np.asfortranarray, np.transpose])), data.draw(st.sampled_from([".npy", ".mat", "v4.mat"]))
    first = data.draw(st.integers(0, samples - 2500))
    values = noise(samples)
    with tempfile.TemporaryDirectory() as folder:
        path, stored = Path(folder) / f"a{suffix}", layout(values[list(order)]).astype(dtype)
        if suffix == ".npy":
            np.save(path, stored)
        else:
            stored = stored.astype(stored.dtype.newbyteorder("="))
            savemat(path, {"fs": 500, data.draw(st.sampled_from(["val", "ECG"])): stored}, format="4" if suffix == "v4.mat" else "5")
        array = about(unit=unit, leads=[LEADS[i] for i in order])
        ecg = read_record(path, first / 500, array)
        expected = (values[:, first : first + SAMPLES] * scale).astype(np.float32)
        np.testing.assert_array_equal(ecg[:, : expected.shape[1]], expected)
        assert not ecg[:, expected.shape[1] :].any()
        assert windows(path, "middle", array) == [max(0, samples - SAMPLES) // 2 / 500]


def test_where_both_sides_fit_leads_come_first(tmp_path):
    square = np.random.default_rng(0).normal(0, 1, (2500, 2500)).astype(np.float32)
    names = [*LEADS, *(f"x{i}" for i in range(2488))]
    np.save(tmp_path / "a.npy", square)
    np.testing.assert_array_equal(read_record(tmp_path / "a.npy", array=about(leads=names))[:, :2500], square[:12])


def test_other_rates_and_nan(tmp_path):
    at = np.arange(2000) / 100
    signal = np.sin(2 * np.pi * at)[:, None] * np.arange(1, 13)
    signal[700, 3] = np.nan
    np.save(tmp_path / "a.npy", signal)
    ecg = read_record(tmp_path / "a.npy", 5.0, about(rate=100))
    expected = np.sin(2 * np.pi * (5 + np.arange(SAMPLES) / 500)) * np.arange(1, 13)[:, None]
    assert set(np.flatnonzero(np.isnan(ecg).any(axis=0))) == set(range(998, 1003)) and not np.isnan(np.delete(ecg, 3, axis=0)).any()
    np.testing.assert_allclose(ecg[:3], expected[:3], atol=0.05)
    assert windows(tmp_path / "a.npy", "all", about(rate=100)) == [0.0, 10.0]


def test_an_array_is_mapped_not_read(tmp_path):
    """8 GB that no disk holds."""
    header = np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype="<i2", shape=(12, 350_000_000))
    header[3, 200_000_007] = 5
    del header
    ecg = read_record(tmp_path / "a.npy", 400_000.0, about())
    assert ecg[3, 7] == 5 and np.count_nonzero(ecg) == 1


def test_bad_arrays_are_refused(tmp_path):
    path = tmp_path / "a.npy"
    for shape, dtype in (((11, 5000), float), (5000, float), ((12, 5000, 1), float), ((12, 5000), complex), ((12, 5000), bool), ((12, 5000), "U1")):
        np.save(path, np.zeros(shape, dtype))
        refusal(path, about())
    np.save(path, np.full((12, 5000), None), allow_pickle=True)  # never unpickled
    refusal(path, about())
    np.save(path, noise())
    content = path.read_bytes()
    for damaged in (b"", content[:50], content[:-1], b"\0" * 1000):
        path.write_bytes(damaged)
        refusal(path, about())
    np.savez(tmp_path / "zip.npz", noise())
    (tmp_path / "zip.npz").rename(path)
    refusal(path, about())
    with pytest.raises(RecordError) as caught:
        read_record(tmp_path / "absent.npy", array=about())
    assert caught.value.reason == "absent" and "absent.npy" not in str(caught.value)  # a file's name may be a patient's

    path = tmp_path / "a.mat"
    for variables in ({"a": noise(), "b": noise()}, {"fs": 500}, {"val": noise(leads=11)}, {"val": "text"}):
        savemat(path, variables)
        refusal(path, about())
    for damaged in (b"", b"MATLAB 7.3 MAT-file" + bytes(105) + b"\0\2IM" + bytes(100)):
        path.write_bytes(damaged)
        refusal(path, about())
    assert "HDF5" in refusal(path, about())


@pytest.mark.parametrize(
    "array",
    ["{", "[]", "null", "{}", about(rate="fast"), about(rate=None), about(rate=0), about(rate=float("nan")), about(rate=1e300), about(unit=3), about(leads=[]),
     about(leads=[1] * 12), json.dumps({"sampling_rate": 500, "unit": "mV", "leads": "I"}), "[" * 100_000],
)  # fmt: skip
def test_bad_descriptions_are_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", noise())
    refusal(tmp_path / "a.npy", array)


def test_infinite_after_conversion_is_left_to_the_quality_rule(tmp_path):
    np.save(tmp_path / "a.npy", np.full((12, SAMPLES), 1e300))
    assert np.isinf(read_record(tmp_path / "a.npy", array=about())).all()

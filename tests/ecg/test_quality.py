import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.ecg.leads import LEADS, SAMPLES
from toolkit.ecg.quality import FLAT_RANGE, FLAT_WINDOW, NAN_RUN, check, read_checked
from toolkit.ecg.records import RecordError, read_record
from toolkit.ecg.saturation import SATURATED_FROM, SATURATED_TIME

DATA = Path(os.environ.get("ECG_DATA", Path(__file__).parents[2] / "../shared/data"))


def sane():
    return np.random.default_rng(0).normal(0, 0.2, (12, SAMPLES)).astype(np.float32)


def reason(ecg):
    with pytest.raises(RecordError) as caught:
        check(ecg)
    return caught.value.reason


def test_a_sane_ecg_passes_untouched():
    ecg, flags = check(sane())
    np.testing.assert_array_equal(ecg, sane())
    assert flags == [] and ecg.dtype == np.float32


@pytest.mark.parametrize("start", [0, 1234, SAMPLES - NAN_RUN])
def test_short_nan_runs_become_straight_lines(start):
    ecg = sane()
    ecg[2, start : start + NAN_RUN] = np.nan
    before = ecg.copy()
    out, flags = check(ecg)
    assert flags == ["nan_interpolated"] and np.isfinite(out).all() and out.dtype == np.float32
    np.testing.assert_array_equal(ecg, before)  # the caller's array is left alone
    np.testing.assert_array_equal(out[~np.isnan(before)], before[~np.isnan(before)])
    left, right = (out[2, i] for i in (max(start - 1, 0), min(start + NAN_RUN, SAMPLES - 1)))
    # Independent of np.interp: a line from the sample before to the one after, constant where one of them is missing.
    if 0 < start < SAMPLES - NAN_RUN:
        line = left + (right - left) * np.arange(1, NAN_RUN + 1) / (NAN_RUN + 1)
    else:
        line = right if start == 0 else left
    np.testing.assert_allclose(out[2, start : start + NAN_RUN], line, atol=1e-6)


def test_longer_nan_runs_and_infinities_are_quarantined():
    ecg = sane()
    ecg[2, 100 : 101 + NAN_RUN] = np.nan
    assert reason(ecg) == "nan"
    ecg = sane()
    ecg[2] = np.nan
    assert reason(ecg) == "nan"
    ecg = sane()
    ecg[2, 7] = np.inf
    assert reason(ecg) == "nan"


@pytest.mark.parametrize(
    ("start", "stop", "flat"), [(0, 2500, True), (2500, 5000, True), (1111, 3611, True), (1111, 3610, False), (0, 2499, False)]
)
@pytest.mark.parametrize("level", [0.0, 1.7])
def test_a_lead_without_a_beat_for_five_seconds_is_flat(start, stop, flat, level):
    ecg = sane()
    ecg[7, start:stop] = level + np.linspace(0, 0.004, stop - start)
    if flat:
        assert reason(ecg) == "flat_lead"
    else:
        check(ecg)


def test_zeros_at_the_end_of_all_leads_are_padding_up_to_five_seconds():
    ecg = sane()
    ecg[:, 2500:] = 0
    assert check(ecg)[1] == ["padded"]
    ecg[:, 2499] = 0
    assert reason(ecg) == "flat_lead"
    assert reason(np.zeros((12, SAMPLES), np.float32)) == "flat_lead"
    ecg = sane()
    ecg[:, 4000:] = 0
    ecg[4, 3990:4000] = np.nan
    out, flags = check(ecg)
    assert flags == ["nan_interpolated", "padded"]
    np.testing.assert_array_equal(out[4, 3990:4000], out[4, 3989])  # not a ramp towards the padding


def test_amplitudes():
    ecg = sane()
    ecg[5, 700] = -12.5  # a spike as in the CinC data
    assert check(ecg)[1] == ["high_amplitude"]
    ecg[5, 700] = 51
    assert reason(ecg) == "amplitude"
    assert reason(sane() * 1000) == "amplitude"  # uV taken for mV
    assert reason(sane() / 1000) == "flat_lead"  # V taken for mV


def test_saturation_is_found():
    ecg = sane()
    ecg[1, 300:320] = 5.0
    assert reason(ecg) == "saturated"
    assert check(ecg, qc="flag")[1] == ["saturated"]
    ecg = sane()
    ecg[1, 300:319] = -5.0
    assert check(ecg)[1] == []
    ecg = sane()
    ecg[1, -60:] = ecg[3, :60] = 5.0  # PTB-XL's held last value
    assert check(ecg)[1] == []
    ecg = sane() / 10
    ecg[1, 300:400] = 0.99  # a long extreme near the median is a quiet baseline
    assert check(ecg)[1] == []


def test_defects_are_quarantined_or_flagged_and_none_twice():
    ecg = sane()
    ecg[1, 300:320] = 60.0  # both saturated and impossible
    ecg[7] = 0.3
    ecg[11] = 0
    flagged = ["amplitude", "flat_lead", "missing_lead", "saturated"]
    out, flags = check(ecg, ["V6"], qc="flag")
    np.testing.assert_array_equal(out, ecg)
    assert flags == flagged  # and not high_amplitude
    for missing, expected in ((["V6"], "missing_lead"), ([], "amplitude")):
        with pytest.raises(RecordError) as caught:
            check(ecg, missing)
        assert caught.value.reason == expected
    ecg[7] = sane()[7]
    assert "flat_lead" not in check(ecg, ["V6"], qc="flag")[1]  # a missing lead is not also flat
    assert "flat_lead" in check(ecg, [], qc="flag")[1]


@pytest.mark.parametrize("qc", ["drop", "flag"])
def test_what_an_encoder_must_never_see_is_an_error_under_both_policies(qc):
    for value, samples in ((np.nan, NAN_RUN + 1), (np.inf, 1), (-np.inf, 1)):
        ecg = sane()
        ecg[2, 100 : 100 + samples] = value
        with pytest.raises(RecordError) as caught:
            check(ecg, qc=qc)
        assert caught.value.reason == "nan"


def slow_defects(signal):
    """Flat and saturated leads by obvious loops."""
    flat = set()
    for i, lead in enumerate(signal):
        if any(np.ptp(lead[at : at + FLAT_WINDOW]) < FLAT_RANGE for at in range(len(lead) - FLAT_WINDOW + 1)):
            flat.add(LEADS[i])
    saturated = set()
    for i, lead in enumerate(signal):
        for extreme in (lead.max(), lead.min()):
            runs, at = [], 0
            while at < len(lead):
                end = at
                while end < len(lead) and lead[end] == extreme:
                    end += 1
                if end > at and at > 0 and end < len(lead):
                    runs.append(end - at)
                at = max(end, at + 1)
            if runs and max(runs) >= SATURATED_TIME * 500 and abs(extreme - np.median(lead)) >= SATURATED_FROM:
                saturated.add(LEADS[i])
    return flat, saturated


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_flat_and_saturated_leads_are_those_that_slow_loops_find(data):
    """Plateaus of about the critical lengths and depths, anywhere in three leads of a possibly padded record."""
    ecg = sane()
    body = data.draw(st.sampled_from([SAMPLES, 2500, 3333]))
    for lead in (0, 5, 11):
        length = data.draw(st.sampled_from([2400, 2499, 2500, 2501, 4000, 19, 20, 21]))
        at = data.draw(st.integers(0, max(0, body - length)) | st.just(0) | st.just(max(0, body - length)))
        end = min(body, at + length)
        slope = data.draw(st.sampled_from([0.0, 0.0049, 0.0051]))
        shape = data.draw(st.sampled_from([np.linspace(0, slope, end - at), slope * (np.arange(end - at) % 2)]))
        ecg[lead, at:end] = data.draw(st.sampled_from([0.2, 0.9, 3.0])) + shape
    ecg[:, body:] = 0
    flat, saturated = slow_defects(ecg[:, :body])
    flags = check(ecg, qc="flag")[1]
    assert ("flat_lead" in flags, "saturated" in flags, "padded" in flags) == (bool(flat), bool(saturated), body < SAMPLES)
    if flat:
        with pytest.raises(RecordError, match=f"^lead {', '.join(name for name in LEADS if name in flat)} is flat"):
            check(ecg)


def test_read_checked_reads_and_checks(tmp_path):
    """A bare array of 8 leads: the four others are zeros and one flag under "flag"; none of the twelve is an error under both."""
    names = [*LEADS[:2], *LEADS[6:]]
    np.save(tmp_path / "a.npy", sane()[[0, 1, *range(6, 12)]])
    array = json.dumps({"sampling_rate": 500, "unit": "mV", "leads": names})
    ecg, flags = read_checked(tmp_path / "a.npy", array=array, qc="flag")
    assert flags == ["missing_lead"] and not ecg[2:6].any()
    np.testing.assert_array_equal(ecg[6:], sane()[6:])
    for qc, about in (("drop", array), ("flag", array.replace('"I', '"X').replace('"V', '"Y'))):
        with pytest.raises(RecordError) as caught:
            read_checked(tmp_path / "a.npy", array=about, qc=qc)
        assert caught.value.reason == "missing_lead"
    np.save(tmp_path / "b.npy", np.concatenate([sane(), sane()], axis=1))
    array = json.dumps({"sampling_rate": 500, "unit": "mV", "leads": LEADS})
    np.testing.assert_array_equal(read_checked(tmp_path / "b.npy", 4.0, array)[0], np.concatenate([sane()[:, 2000:], sane()[:, :2000]], axis=1))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.integers(1, 70), st.sampled_from([np.nan, np.nan, np.inf, 0.0, 20.0]))
def test_what_passes_is_finite_and_differs_only_where_it_was_nan(seed, spots, length, value):
    rng, ecg = np.random.default_rng(seed), sane()
    for _ in range(spots):
        lead, at = rng.integers(12), rng.integers(SAMPLES)
        ecg[lead, at : at + length] = value
    try:
        out, flags = check(ecg, qc="flag")
    except RecordError as error:
        assert error.reason == "nan" and not np.isfinite(ecg).all()
        return
    assert np.isfinite(out).all() and out.shape == ecg.shape and flags == sorted(set(flags))
    assert (out == ecg)[np.isfinite(ecg)].all()
    assert ("nan_interpolated" in flags) == bool(np.isnan(ecg).any())


def test_no_record_of_the_shared_ptbxl_is_lost():
    headers = sorted(DATA.glob("ptbxl_mv/**/*.hea")) + sorted(DATA.glob("ptbxl/**/*.hea"))[::80]
    if not headers:
        pytest.skip(f"no records in {DATA / 'ptbxl'}: set ECG_DATA")
    for header in headers:
        assert np.isfinite(check(read_record(header))[0]).all()


def test_the_flat_records_of_the_shared_ningbo_are_found():
    """Six records have leads that are constant for 10 s; here that is found by peak-to-peak over the whole record."""
    headers = sorted(DATA.glob("cinc2021/ningbo/*.hea"))
    if not headers:
        pytest.skip(f"no records in {DATA / 'cinc2021/ningbo'}: set ECG_DATA")
    for header in headers:
        ecg = read_record(header)
        if np.ptp(ecg, axis=1).min() == 0:
            assert reason(ecg) == "flat_lead"
        else:
            check(ecg)


@pytest.mark.parametrize("rate", [100, 250, 257, 360, 400, 1000])
def test_saturation_is_seen_at_other_sampling_rates(tmp_path, rate):
    """Resampling turns a plateau into ripple, so it must be found before."""
    t = np.arange(10 * rate) / rate
    wave = np.stack([np.sin(2 * np.pi * (1 + 0.1 * i) * t) * 1.4 for i in range(12)])
    about = json.dumps({"sampling_rate": rate, "unit": "mV", "leads": list(LEADS)})
    np.save(tmp_path / "sane.npy", wave)
    assert read_checked(tmp_path / "sane.npy", array=about)[1] == []
    wave[6] = wave[6].clip(-1.2, 1.2)
    np.save(tmp_path / "clipped.npy", wave)
    assert read_checked(tmp_path / "clipped.npy", array=about, qc="flag")[1] == ["saturated"]
    with pytest.raises(RecordError, match="lead V1 sits at its extreme"):
        read_checked(tmp_path / "clipped.npy", array=about)


def test_an_absurd_amplitude_is_refused_under_both_policies():
    """3e38 is finite in float32, but the mean that normalises it is not: it would reach the encoder as NaN."""
    ecg = np.random.default_rng(0).normal(0, 0.3, (12, 5000)).astype(np.float32)
    ecg[2] = np.linspace(3.0e38, 3.2e38, 5000)
    for qc in ("drop", "flag"):
        with pytest.raises(RecordError) as caught:
            check(ecg, qc=qc)
        assert caught.value.reason == "amplitude"

"""Our reading of WFDB files against the `wfdb` package's, bit for bit."""

import os
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.ecg import wfdb_files
from toolkit.ecg.leads import LEADS, SAMPLES
from toolkit.ecg.opened import MILLIVOLTS
from toolkit.ecg.records import RecordError, read_record, windows

INVALID = {"16": -(2**15), "212": -(2**11), "508": -(2**7), "516": -(2**15), "524": -(2**23)}
BITS = {"16": 16, "212": 12, "508": 8, "516": 16, "524": 24}


def by_wfdb(path, first=0, last=None) -> np.ndarray:
    """float32 [12, n] mV as the package reads it, leads looked up one by one."""
    record = wfdb.rdrecord(str(path), sampfrom=first, sampto=last)
    names = [name.lower() for name in record.sig_name]
    columns = [names.index(lead.lower()) for lead in LEADS]
    scale = [MILLIVOLTS.get(record.units[c].lower(), 1.0) for c in columns]
    return np.stack([record.p_signal[:, c] * s for c, s in zip(columns, scale)]).astype(np.float32)


def padded(ecg) -> np.ndarray:
    return np.pad(ecg[:, :SAMPLES], ((0, 0), (0, max(0, SAMPLES - ecg.shape[1]))))


def native(path) -> bool:
    """Whether the record is read without the package."""
    return "_open_with_wfdb" not in wfdb_files.open_wfdb(str(path)).read.__qualname__


def digital(seed, samples, signals=12, bits=16) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1), (samples, signals))


def pack(values, form) -> bytes:
    """Digital values [n, signals] as the file's bytes, by the format's document."""
    if form == "16":
        return values.astype("<i2").tobytes()
    out, flat = bytearray(), [int(v) & 0xFFF for v in values.ravel()]
    for at in range(0, len(flat), 2):
        one, two = flat[at], flat[at + 1] if at + 1 < len(flat) else 0
        out += bytes([one & 0xFF, one >> 8 | (two >> 8) << 4, two & 0xFF])
    return bytes(out)


def write(folder, groups, rate=500, name="rec", junk=b"", lines=None) -> Path:
    """A record of several files: groups of (format, values [n, signals]); `lines` are what follows the file and format, one a signal."""
    path, header, at = Path(folder) / name, [], 0
    for number, (form, values) in enumerate(groups):
        file = f"{name}_{number}.dat"
        offset = f"+{len(junk)}" if junk else ""
        if form in ("16", "212"):
            path.with_name(file).write_bytes(junk + pack(values, form))
        else:
            wfdb.io._signal.wr_dat_file(file, form, values, 0, write_dir=str(folder))
        for _ in range(values.shape[1]):
            header.append(f"{file} {form}{offset} {lines[at]}")
            at += 1
    path.with_suffix(".hea").write_text(f"{name} {at} {rate} {len(groups[0][1])}\n" + "\n".join(header) + "\n")
    return path


def fields(gain="1000.0(0)/mV", zero=0, leads=LEADS):
    return [f"{gain} 16 {zero} 0 0 0 {lead}" for lead in leads]


gains = st.one_of(
    st.sampled_from(["200", "1000.0", "204.8", "0", "0.0", "1e3", "-500", "1000.25", "3.3"]), st.integers(1, 100_000).map(str),
    st.floats(0.01, 1e5).map(lambda g: f"{g:.5f}"),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_16_and_212_as_wfdb_reads_them(data):
    """Random gains, baselines, units, omitted fields, lead orders, extra leads, one or two files, offsets, lengths, invalid samples."""
    form = data.draw(st.sampled_from(["16", "212"]))
    samples = data.draw(st.integers(2500, 5200))
    leads = data.draw(st.permutations(LEADS)) + data.draw(st.sampled_from([[], ["VX"], ["VX", "VY"]]))
    lines = []
    for lead in leads:
        gain = data.draw(gains) + data.draw(st.sampled_from(["", "(0)", "(-7)", "(1024)", "(20000000)"])) + data.draw(st.sampled_from(["", "/mV", "/uV"]))
        zero = data.draw(st.sampled_from(["0", "-3", "512"]))
        lines.append(f"{gain} {data.draw(st.sampled_from(['12', '16']))} {zero} 5 -77 0 {data.draw(st.sampled_from([lead, lead.upper()]))}")
    values = digital(data.draw(st.integers(0, 2**32 - 1)), samples, len(leads), BITS[form])
    if data.draw(st.booleans()):
        values[data.draw(st.integers(0, samples - 1)) :: 997, data.draw(st.integers(0, len(leads) - 1))] = INVALID[form]
    cut = data.draw(st.integers(1, len(leads)))
    groups = [(form, part) for part in (values[:, :cut], values[:, cut:]) if part.shape[1]]
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, groups, lines=lines, junk=bytes(data.draw(st.sampled_from([0, 24, 5]))))
        assert native(path)
        np.testing.assert_array_equal(read_record(path), padded(by_wfdb(path)))
        first = data.draw(st.integers(0, samples - 2500))
        np.testing.assert_array_equal(read_record(path, first / 500), padded(by_wfdb(path, first)))


@settings(max_examples=6, deadline=None)
@given(st.sampled_from(["508", "516", "524"]), st.integers(2500, 5200), st.integers(4, 8), st.sampled_from(["1000.0(0)/mV", "204.8(77)/uV", "3.3/V"]))
def test_flac_as_wfdb_reads_it(form, samples, cut, gain):
    values = digital(samples, samples, bits=BITS[form])
    values[100:103, 5] = INVALID[form]
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, [(form, values[:, :cut]), (form, values[:, cut:])], lines=fields(gain))
        assert native(path)
        for first in (0, samples - 2500):
            np.testing.assert_array_equal(read_record(path, first / 500), padded(by_wfdb(path, first)))
        assert np.isnan(read_record(path)).sum() == 3


@pytest.mark.parametrize(
    ("form", "bits", "ours"), [("16", 16, True), ("16x1", 16, True), ("16:0", 16, True), ("16:3", 16, False), ("80", 8, False), ("32", 16, False)]
)
def test_other_forms_are_left_to_wfdb(tmp_path, form, bits, ours):
    values = digital(0, 5000, bits=bits)
    path = write(tmp_path, [("16", values)], lines=fields())
    data = {"80": (values + 128).astype(np.uint8).tobytes(), "32": values.astype("<i4").tobytes()}.get(form)
    if data:
        path.with_name("rec_0.dat").write_bytes(data)
    header = path.with_suffix(".hea")
    header.write_text(header.read_text().replace(".dat 16", f".dat {form}"))
    assert native(path) is ours
    np.testing.assert_array_equal(read_record(path), by_wfdb(path))
    np.testing.assert_array_equal(read_record(path, 2.0), padded(by_wfdb(path, 1000)))


def test_differences_are_summed_from_the_beginning(tmp_path):
    """Format 8: the package itself gets a window wrong, so the expected one is cut from its whole record."""
    steps = digital(3, 7000, bits=3)
    path = write(tmp_path, [("16", steps)], lines=fields())
    path.with_name("rec_0.dat").write_bytes(steps.astype(np.int8).tobytes())
    header = path.with_suffix(".hea")
    header.write_text(header.read_text().replace(".dat 16", ".dat 8"))
    np.testing.assert_allclose(read_record(path, 4.0), np.cumsum(steps, axis=0)[2000:].T / 1000, atol=1e-6)


def test_without_a_stated_length_the_files_decides(tmp_path):
    for form, bits in (("16", 16), ("212", 12), ("16x1", 16)):
        path = write(tmp_path, [(form[:3].removesuffix("x"), digital(1, 6000, bits=bits))], lines=fields())
        header = path.with_suffix(".hea")
        header.write_text(header.read_text().replace(" 500 6000", " 500").replace(".dat 16 ", f".dat {form} "))
        np.testing.assert_array_equal(read_record(path, 1.0), by_wfdb(path)[:, 500:5500])
        assert windows(path, "middle") == [1.0]


def test_without_a_stated_rate_it_is_250(tmp_path):
    path = write(tmp_path, [("16", digital(1, 6000))], lines=fields())
    header = path.with_suffix(".hea")
    header.write_text(header.read_text().replace(" 500 6000", ""))
    assert windows(path, "all") == [0.0, 10.0] and wfdb.rdheader(str(path)).fs == 250


@pytest.mark.parametrize("layout", ["fixed", "variable"])
def test_multi_segment_records_go_through_wfdb(tmp_path, layout):
    """Three segments and, in the variable layout, a gap, over which the window lies; a gap is NaN."""
    parts = [digital(i, 3000) for i in range(3)]
    names = [write(tmp_path, [("16", part)], name=f"s{i}", lines=fields()).name for i, part in enumerate(parts)]
    if layout == "fixed":
        lines = [f"{name} 3000" for name in names]
        whole = np.concatenate(parts).T / 1000
    else:
        (tmp_path / "layout.hea").write_text("layout 12 500 0\n" + "".join(f"~ 0 {line}\n" for line in fields()))
        lines = ["layout 0", "s0 3000", "~ 1000", "s1 3000", "s2 3000"]
        whole = np.concatenate([parts[0], np.full((1000, 12), np.nan), *parts[1:]]).T / 1000
    (tmp_path / "multi.hea").write_text(f"multi/{len(lines)} 12 500 {whole.shape[1]}\n" + "\n".join(lines) + "\n")
    for start in (0, 2, 3.998, windows(tmp_path / "multi", "middle")[0]):
        first = round(start * 500)
        np.testing.assert_array_equal(read_record(tmp_path / "multi", start), whole[:, first : first + SAMPLES].astype(np.float32))
    assert windows(tmp_path / "multi", "all") == [0.0, 10.0]  # 18 s and 20 s


def test_of_a_long_record_only_the_window_is_read(tmp_path):
    """24 h of 12 leads, 1 GB (of zeros that no disk holds), with a marked sample at 20 h."""
    samples, hour = 24 * 3600 * 500, 3600 * 500
    path = write(tmp_path, [("16", np.zeros((1, 12)))], lines=fields())
    header = path.with_suffix(".hea")
    header.write_text(header.read_text().replace(" 500 1\n", f" 500 {samples}\n"))
    with open(tmp_path / "rec_0.dat", "r+b") as file:
        file.truncate(samples * 24)
        file.seek(20 * hour * 24)
        file.write(np.arange(12, dtype="<i2").tobytes())
    tracemalloc.start()
    ecg = read_record(path, 20 * 3600 - 1)
    assert windows(path, "all")[-1] == 24 * 3600 - 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(ecg[:, 500], np.arange(12) / 1000)
    assert np.count_nonzero(ecg) == 11 and peak < 2e6


def refusal(path, **options) -> str:
    with pytest.raises(RecordError) as caught:
        read_record(path, **options)
    assert caught.value.reason in ("unreadable", "absent") and "\n" not in str(caught.value)
    return str(caught.value)


def test_header_and_data_must_agree(tmp_path):
    path = write(tmp_path, [("16", digital(0, 5000))], lines=fields())
    header, data = path.with_suffix(".hea"), tmp_path / "rec_0.dat"
    text, content = header.read_text(), data.read_bytes()
    read_record(path)
    for signals in (11, 13):
        header.write_text(text.replace("rec 12", f"rec {signals}"))
        assert "describes 12 signals" in refusal(path)
    header.write_text(text)
    for cut, word in ((content[:-1], "shorter"), (b"", "shorter"), (content + bytes(1), "longer"), (content + content[:24], "longer")):
        data.write_bytes(cut)
        assert word in refusal(path)
    path = write(tmp_path, [("516", digital(0, 5000)[:, :8]), ("516", digital(0, 5000)[:, 8:])], lines=fields(), name="flac")
    text = path.with_suffix(".hea").read_text()
    for wrong in (text.replace(" 5000", " 4999"), text.replace(" 5000", " 5001"), text.replace(" 516 ", " 508 "), text.replace("flac_1", "flac_0")):
        path.with_suffix(".hea").write_text(wrong)
        assert "FLAC" in refusal(path)


def test_a_file_name_in_a_header_never_leads_out_of_the_folder(tmp_path):
    (tmp_path / "secret").mkdir()
    path = write(tmp_path, [("16", digital(0, 5000))], lines=fields())
    os.replace(tmp_path / "rec_0.dat", tmp_path / "secret" / "rec_0.dat")
    text = path.with_suffix(".hea").read_text()
    for name in ("secret/rec_0.dat", "../rec_0.dat", str(tmp_path / "secret" / "rec_0.dat"), "..", "secret\\rec_0.dat"):
        path.with_suffix(".hea").write_text(text.replace("rec_0.dat", name))
        refusal(path)
    path.with_suffix(".hea").write_text("rec/1 12 500 5000\nsecret/rec 5000\n")
    refusal(path)


def test_no_message_names_a_folder_a_date_or_the_files_text(tmp_path):
    folder = tmp_path / "p10000032"
    folder.mkdir()
    path = write(folder, [("16", digital(0, 5000))], lines=fields(), name="40689238")
    header = path.with_suffix(".hea")
    text = header.read_text() + "# <subject_id>: 10000032\n"
    dated = text.replace(" 500 5000", " 500 5000 99:99 31/31/2156").replace(".dat 16", ".dat 16:3")  # the package quotes the date
    for content in (text.replace(".dat 16", ".dat 999"), text.replace("40689238_0.dat", "nothing.dat"), dated, "", "\0"):
        header.write_text(content)
        assert not any(word in refusal(path) for word in ("10000032", "40689238", "2156", "99:99", str(tmp_path)))
    header.unlink()
    assert refusal(path) == "a file of the record is not there"


HEADER = "".join(f"rec.dat 16+2 {g} 16 {z} 0 0 0 {lead}\n" for lead, g, z in zip(LEADS, ["200/mV", "1e3(5)/uV", "0", "204.8"] * 3, [0, 9, -4] * 4))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255) | st.sampled_from(b"0123456789 .-+x:/()\nIVa#\t\xb5")), min_size=1, max_size=4))
def test_damaged_headers_are_refused_or_read_as_wfdb_does(flips):
    """Random bytes in a header: nothing but `RecordError`, and where both read it, the same samples."""
    header = bytearray(f"rec 12 500 5000 12:00:00\n{HEADER}# age: 60\n".encode())
    for at, byte in flips:
        header[at % len(header)] = byte
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rec"
        path.with_suffix(".hea").write_bytes(header)
        path.with_suffix(".dat").write_bytes(bytes(2) + pack(digital(7, 5000), "16"))
        try:
            windows(path, "all")
            ecg = read_record(path)
        except RecordError as error:
            assert "\n" not in str(error) and folder not in str(error)
            return
        try:
            record = wfdb.rdheader(str(path))
            expected = by_wfdb(path)
        except Exception:
            return
        if record.fs == 500 and b"\xb5" not in header:  # the package drops the micro sign and takes uV for V
            np.testing.assert_array_equal(ecg, padded(expected))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_garbage_headers_are_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rec.hea").write_bytes(content)
        (Path(folder) / "rec.dat").write_bytes(bytes(120_000))
        for call in (lambda: read_record(Path(folder) / "rec"), lambda: windows(Path(folder) / "rec", "all")):
            with pytest.raises(RecordError):
                call()


def test_micro_signs_are_understood(tmp_path):
    values = digital(0, 5000)
    path = write(tmp_path, [("16", values)], lines=fields("2(0)/µV"))
    text = path.with_suffix(".hea").read_text()
    greek = text.replace("\N{MICRO SIGN}", "\N{GREEK SMALL LETTER MU}")
    assert greek != text
    for content in (text.encode(), text.encode("latin-1"), greek.encode()):
        path.with_suffix(".hea").write_bytes(content)
        np.testing.assert_allclose(read_record(path), values.T / 2000, rtol=1e-6)

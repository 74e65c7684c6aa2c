"""The synthetic heart shows what its labels say, and the corpus is readable, consistent, balanced and reproducible."""

import ast
import csv
import filecmp
import json
import os
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import wfdb
from scipy.signal import find_peaks

from toolkit.ecg import synthetic, synthetic_text
from toolkit.ecg.heart import AXIS_DEGREES, Heart, _beats, draw, simulate
from toolkit.ecg.leads import LEADS
from toolkit.errors import UserError

LEAD = {lead: i for i, lead in enumerate(LEADS)}
MANY = [draw(np.random.default_rng([1, i])) for i in range(1000)]
RATES = {"sinus": 75, "bradycardia": 45, "tachycardia": 125, "arrhythmia": 70, "fibrillation": 90, "flutter": 75, "paced": 70}


def heart(i: int = 0, **labels) -> Heart:
    """A heart with the given labels and the rest normal; `i` varies the patient."""
    base = draw(np.random.default_rng([2, i]))
    clean = {"rhythm": "sinus", "conduction": "none", "morphology": "none", "ectopy": "none", "axis": "normal", **labels}
    clean.setdefault("rate", RATES[clean["rhythm"]])
    clean.setdefault("axis_degrees", sum(AXIS_DEGREES[clean["axis"]]) / 2)
    clean.setdefault("pr", 0.30 if clean["conduction"] == "first_degree" else 0.15)
    clean.setdefault("modulation", 0.25 if clean["rhythm"] == "arrhythmia" else 0.015)
    clean.setdefault("ectopics", 2 if clean["ectopy"] != "none" else 0)
    return replace(base, ratio=4, **clean)


def record(i: int = 0, **labels) -> np.ndarray:
    return simulate(heart(i, **labels), np.random.default_rng([3, i]))


def peaks(signal: np.ndarray) -> np.ndarray:
    """Samples of the QRS complexes: peaks of the slope over 20 ms, all leads summed, above its median (noise, T, flutter)."""
    smooth = np.apply_along_axis(np.convolve, 1, signal, np.ones(8) / 8, mode="same")
    slope = np.pad(np.abs(smooth[:, 10:] - smooth[:, :-10]).sum(axis=0), 5)
    slope = np.convolve(slope, np.ones(50) / 50, mode="same")
    slope -= np.median(slope)
    return find_peaks(slope, height=0.4 * np.quantile(slope, 0.97), distance=120)[0]


def beat(i: int = 0, **labels) -> np.ndarray:
    """Median beat [12, 300] of `record(i, ...)`, 0.2 s before to 0.4 s after the true R, from the PR level."""
    signal, (times, _) = record(i, **labels), _beats(heart(i, **labels), np.random.default_rng([3, i]))
    found = [p for p in np.rint(times * 500).astype(int) if 100 <= p < 4800]
    median = np.median([signal[:, p - 100 : p + 200] for p in found], axis=0)
    return median - median[:, 55:65].mean(axis=1, keepdims=True)


def width(i: int, **labels) -> float:
    """QRS duration in s: span in which the median beat's slope over 8 ms, all leads, is above a fifth of its maximum."""
    median = beat(i, **labels)[:, 40:170]
    slope = np.abs(median[:, 4:] - median[:, :-4]).sum(axis=0)
    above = np.flatnonzero(slope > 0.2 * slope.max())
    return (above[-1] - above[0]) / 500


# --- the heart --------------------------------------------------------------------------------------------------------


def test_limb_leads_obey_einthoven_and_goldberger():
    for i, h in enumerate(MANY[:20]):
        x = simulate(h, np.random.default_rng(i))
        assert x.shape == (12, 5000) and x.dtype == np.float32 and np.isfinite(x).all() and np.abs(x).max() < 8
        one, two = x[0], x[1]
        for lead, law in (("III", two - one), ("aVR", -(one + two) / 2), ("aVL", one - two / 2), ("aVF", two - one / 2)):
            np.testing.assert_allclose(x[LEAD[lead]], law, atol=2e-6)


@pytest.mark.parametrize("rhythm,low,high", [("bradycardia", 37, 54), ("sinus", 58, 97), ("tachycardia", 105, 148)])
def test_rate_is_the_rhythms(rhythm, low, high):
    for i in range(4):
        rr = np.diff(peaks(record(i, rhythm=rhythm))) / 500
        assert low < 60 / rr.mean() < high


def test_fibrillation_is_irregular_and_sinus_arrhythmia_swings():
    def spread(rhythm: str) -> float:
        rr = [np.diff(peaks(record(i, rhythm=rhythm))) for i in range(6)]
        return float(np.mean([r.std() / r.mean() for r in rr]))

    assert spread("fibrillation") > 0.15 and spread("arrhythmia") > 0.10
    assert spread("sinus") < 0.04 and spread("flutter") < 0.03 and spread("paced") < 0.03


def test_flutter_waves_between_the_beats():
    h = heart(rhythm="flutter")
    power = np.abs(np.fft.rfft(simulate(h, np.random.default_rng(0))[LEAD["aVF"]])) ** 2
    hertz = np.arange(len(power)) / 10
    assert abs(hertz[(hertz > 3) & (hertz < 7)][power[(hertz > 3) & (hertz < 7)].argmax()] - h.rate * h.ratio / 60) < 0.2


def test_bundle_branch_blocks():
    normal, left, right = (np.mean([width(i, conduction=c) for i in range(4)]) for c in ("none", "lbbb", "rbbb"))
    assert normal < 0.11 and left > 0.12 and right > 0.11
    qrs = beat(conduction="lbbb")[:, 50:150]
    assert qrs[LEAD["V1"]].min() < -0.5 and qrs[LEAD["V1"]].max() < 0.15 and qrs[LEAD["V6"]].max() > 0.5
    qrs = beat(conduction="rbbb")[:, 50:160]
    assert qrs[LEAD["V1"]].argmax() > qrs[LEAD["V1"]].argmin() and qrs[LEAD["V1"]].max() > 0.4
    assert qrs[LEAD["V6"]].min() < -0.2 and qrs[LEAD["I"]].min() < -0.2


def test_pr_interval_is_long_in_first_degree_block():
    def p_to_r(**labels) -> float:
        x = record(morphology="none", **labels)[LEAD["II"]]
        before = np.median([x[p - 190 : p - 25] for p in peaks(record(**labels)) if p >= 190], axis=0)
        return (190 - before.argmax()) / 500

    assert p_to_r(conduction="first_degree", rate=65) - p_to_r(rate=65) > 0.09


@pytest.mark.parametrize("axis,one,foot", [("normal", 1, 1), ("left", 1, -1), ("right", -1, 1)])
def test_axis_is_seen_in_one_and_avf(axis, one, foot):
    for i in range(6):
        qrs = beat(i, axis=axis)[:, 70:130].sum(axis=1)
        assert np.sign(qrs[LEAD["I"]]) == one and np.sign(qrs[LEAD["aVF"]]) == foot


def test_st_elevation_and_its_reciprocal():
    def st(i, morphology):
        return beat(i, morphology=morphology)[:, 140:150].mean(axis=1)  # 80-100 ms after R

    for i in range(4):
        normal, front, low = (st(i, m) for m in ("none", "anterior_mi", "inferior_mi"))
        assert (front - normal)[[LEAD[v] for v in ("V1", "V2", "V3", "V4")]].min() > 0.15 and (front - normal)[LEAD["aVF"]] < -0.04
        assert (low - normal)[[LEAD[v] for v in ("II", "III", "aVF")]].min() > 0.12
        assert (low - normal)[[LEAD[v] for v in ("I", "aVL")]].max() < -0.05


def test_voltage_and_t_waves():
    size = {m: np.mean([np.ptp(beat(i, morphology=m)[:6, 60:140]) for i in range(6)]) for m in ("none", "low_voltage", "lvh")}
    assert size["low_voltage"] < 0.5 * size["none"] and size["lvh"] > 1.5 * size["none"]
    for lead in ("V4", "V5", "I"):
        assert beat(morphology="t_inversion")[LEAD[lead], 180:300].sum() < 0 < beat()[LEAD[lead], 180:300].sum()


def test_extrasystoles_come_early_and_as_many_as_said():
    for ectopy in ("atrial", "ventricular"):
        for i in range(8):
            h = heart(i, ectopy=ectopy, ectopics=1 + i % 3)
            rr = np.diff(peaks(simulate(h, np.random.default_rng([3, i])))) / np.float64(500) * h.rate / 60
            assert (rr < 0.82).sum() == h.ectopics, (ectopy, i, rr)


def test_drawn_conditions_are_frequent_and_exclude_each_other():
    count = Counter(code for h in MANY for code in synthetic_text.scp_codes(h)) + Counter(h.axis for h in MANY if h.rhythm != "paced")
    codes = {line.split("|")[0] for line in synthetic.STATEMENTS.splitlines()}
    assert codes == set(count) - {"normal", "left", "right"}
    assert min(count.values()) >= 40, count
    assert 0.09 <= count["NORM"] / 1000 <= 0.15
    for h in MANY:
        if h.rhythm == "paced":
            assert (h.conduction, h.morphology, h.ectopy) == ("none",) * 3
        assert h.conduction != "first_degree" or h.rhythm in ("sinus", "bradycardia", "arrhythmia")


# --- words ------------------------------------------------------------------------------------------------------------


def test_report_and_codes():
    h = heart(axis="left", conduction="lbbb", ectopy="ventricular", ectopics=1)
    assert synthetic_text.report(h) == "sinus rhythm. left axis type. left bundle branch block. 1 ventricular extrasystole."
    assert synthetic_text.scp_codes(h) == {"CLBBB": 100.0, "PVC": 0.0, "SR": 0.0}
    assert synthetic_text.report(heart()) == "sinus rhythm. normal axis. normal ecg."
    assert list(synthetic_text.scp_codes(heart())) == ["NORM", "SR"]
    assert synthetic_text.report(heart(rhythm="paced")) == "pacemaker rhythm."


def rows_of(records: int, seed: int = 0) -> dict[str, list[dict]]:
    """The corpus's questions by split, without its signals."""
    split = defaultdict(list)
    for ecg_id, person in enumerate(synthetic.patients(records, seed), 1):
        rng = np.random.default_rng([seed, ecg_id])
        split[synthetic.SPLITS[person["strat_fold"]]] += synthetic_text.ask(draw(rng), ecg_id, rng)
    return split


def blind(train: list[dict], test: list[dict]) -> dict[str, float]:
    """Exact match by type of the majority answer of (template, attribute), which never sees an ECG."""

    def key(row):
        return row["template_id"], tuple(sorted(row["attribute"]))

    seen = defaultdict(Counter)
    for row in train:
        seen[key(row)][tuple(row["answer"])] += 1
    hits = defaultdict(list)
    for row in test:
        best = seen[key(row)].most_common(1)
        hits[row["question_type"]].append(bool(best) and best[0][0] == tuple(row["answer"]))
    return {kind: float(np.mean(h)) for kind, h in hits.items()}


def test_the_question_alone_says_little():
    split = rows_of(4000)
    rows = [row for part in split.values() for row in part]
    assert 9 < len(rows) / 4000 < 11
    share = Counter(row["question_type"] for row in rows)
    for kind, wanted in (("single-verify", 0.4), ("single-choose", 0.3), ("single-query", 0.3)):
        assert abs(share[kind] / len(rows) - wanted) < 0.03
    # In expectation 50, 36 and 23 %; the margin is 3 standard errors of 400 test ECGs.
    score = blind(split["train"], split["test"])
    assert score["single-verify"] < 0.54 and score["single-choose"] < 0.41 and score["single-query"] < 0.35, score
    for attribute in {tuple(r["attribute"]) for r in rows if r["question_type"] == "single-verify"}:
        said = [r["answer"] == ["yes"] for r in rows if r["question_type"] == "single-verify" and tuple(r["attribute"]) == attribute]
        assert abs(np.mean(said) - 0.5) < 0.09, attribute  # 3 standard errors of the ~600 asked, and of the survey


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return synthetic.write_corpus(tmp_path_factory.mktemp("corpus") / "data", records=200, seed=5)


@pytest.fixture(scope="module")
def table(corpus):
    with open(corpus / "ptbxl" / "ptbxl_database.csv") as file:
        return list(csv.DictReader(file))


def questions(corpus, split):
    return [row for file in sorted((corpus / "ecgqa" / split).glob("*.json")) for row in json.loads(file.read_text())]


def test_wfdb_reads_the_signal_back(corpus, table, tmp_path):
    for ecg_id in (1, 2, 200):
        rng = np.random.default_rng([5, ecg_id])
        h = draw(rng)
        synthetic_text.ask(h, ecg_id, rng)
        expected = simulate(h, rng)
        name = str(corpus / "ptbxl" / table[ecg_id - 1]["filename_hr"])
        signal, fields = wfdb.rdsamp(name)
        assert fields["fs"] == 500 and fields["units"] == ["mV"] * 12
        assert fields["sig_name"] == [lead.upper() for lead in LEADS]
        assert np.abs(signal.T - expected).max() <= 0.0005 + 1e-6  # half a step of 1 uV
        raw = wfdb.rdrecord(name, physical=False)
        assert raw.checksum == [c % 65536 for c in raw.calc_checksum()] and raw.init_value == raw.d_signal[0].tolist()
        wfdb.wrsamp(os.path.basename(name), 500, ["mV"] * 12, raw.sig_name, d_signal=raw.d_signal, fmt=["16"] * 12,
                    adc_gain=[1000.0] * 12, baseline=[0] * 12, write_dir=str(tmp_path))  # fmt: skip
        for ending in (".hea", ".dat"):  # byte for byte what wfdb writes
            assert filecmp.cmp(name + ending, tmp_path / (os.path.basename(name) + ending), shallow=False)


def test_table_is_ptbxls(corpus, table):
    assert len(table) == 200 and list(table[0]) == synthetic.COLUMNS and len(synthetic.COLUMNS) == 28
    folds, people = defaultdict(set), Counter()
    for row in table:
        folds[row["patient_id"]].add(row["strat_fold"])
        people[row["strat_fold"]] += 1
    assert all(len(f) == 1 for f in folds.values()) and set(people) == {str(f) for f in range(1, 11)}
    assert 1.05 < len(table) / len(folds) < 1.3
    with open(corpus / "ptbxl" / "scp_statements.csv") as file:
        known = {row[""] for row in csv.DictReader(file)}
    for row in table:
        assert set(ast.literal_eval(row["scp_codes"])) <= known
        assert row["heart_axis"] in ("MID", "LAD", "RAD") or (row["heart_axis"] == "" and "PACE" in row["scp_codes"])


def test_every_answer_follows_from_the_labels(corpus, table):
    with open(corpus / "ecgqa" / "answers_for_each_template.csv") as file:
        classes = {int(row["template_id"]): ast.literal_eval(row["classes"]) for row in csv.DictReader(file)}
    tables = (synthetic_text.RHYTHM, synthetic_text.CONDUCTION, synthetic_text.MORPHOLOGY, synthetic_text.ECTOPY, synthetic_text.AXIS)
    words = {row[0]: row[1] for part in tables for row in part.values()}
    words |= {"NORM": "normal ecg", "VES": "ventricular extrasystoles", "SVES": "supraventricular extrasystoles"}
    meaning = {}
    for split in ("train", "valid", "test"):
        rows = questions(corpus, split)
        assert [row["sample_id"] for row in rows] == list(range(len(rows))) and rows
        for row in rows:
            labels = table[row["ecg_id"][0] - 1]
            codes = [*ast.literal_eval(labels["scp_codes"]), labels["heart_axis"], labels["extra_beats"][1:]]
            true = {words[code] for code in codes if code}
            asked, said = set(row["attribute"]), row["answer"]
            if row["question_type"] == "single-verify":
                assert said == ["yes" if asked & true else "no"], row
            else:
                assert said == (sorted(asked & true) or ["none"]), row
            assert set(said) <= set(classes[row["template_id"]])
            assert synthetic.SPLITS[int(labels["strat_fold"])] == split
            if row["question_type"] != "single-query":
                assert all(word in row["question"] for word in row["attribute"])
            assert meaning.setdefault(row["question_id"], (row["template_id"], asked)) == (row["template_id"], asked)


def test_same_bytes_for_one_and_two_workers_and_a_prefix_of_more(corpus, tmp_path):
    one, two = (synthetic.write_corpus(tmp_path / str(w), records=40, seed=5, workers=w) for w in (1, 2))
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(two) for p in two.rglob("*") if p.is_file()) and len(files) == 80 + 7
    assert filecmp.cmpfiles(one, two, files, shallow=False)[0] == files
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]
    records = [f for f in files if "records500" in f.parts]
    assert filecmp.cmpfiles(one, corpus, records, shallow=False)[0] == records
    for split in ("train", "valid", "test"):
        short = questions(one, split)
        assert questions(corpus, split)[: len(short)] == short


def test_complete_corpus_is_left_and_foreign_folders_are_refused(corpus, tmp_path, capsys):
    before = (corpus / "corpus.json").stat().st_mtime_ns
    assert synthetic.write_corpus(corpus, records=200, seed=5) == corpus
    assert "already complete" in capsys.readouterr().out and (corpus / "corpus.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="--out .*delete it"):
        synthetic.write_corpus(corpus, records=200, seed=6)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="no synthetic corpus"):
        synthetic.write_corpus(tmp_path / "mine", records=3)
    with pytest.raises(UserError, match="--records 0"):
        synthetic.write_corpus(tmp_path / "none", records=0)
    with pytest.raises(SystemExit) as stop:
        synthetic.main(["--out", str(tmp_path / "none"), "--records", "-4"])
    assert stop.value.code == 2 and "--records" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine"]


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "write_record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        synthetic.write_corpus(tmp_path / "data", records=3)
    assert os.listdir(tmp_path) == []

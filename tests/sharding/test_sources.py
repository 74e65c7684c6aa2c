"""Every source against miniature downloads in the real layouts, and against the real records where there are some."""

import argparse
import csv
import gzip
import json
import random
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import wfdb

from sharding.manifest import SCHEMA, pseudonym
from sharding.sources import SOURCES
from sharding.sources.mimic import join_statements
from toolkit.ecg.leads import LEADS
from toolkit.ecg.records import read_record
from toolkit.errors import UserError

COLUMNS = set(SCHEMA.names) - {"qc", "start"}


def rows(source, root, *options):
    """The source's rows as prepare gets them, in the types of the manifest."""
    module, parser = SOURCES[source], argparse.ArgumentParser()
    if hasattr(module, "add_arguments"):
        module.add_arguments(parser)
    found = list(module.rows(Path(root), parser.parse_args(list(map(str, options)))))
    global left_out
    left_out = [row["left_out"] for row in found if "left_out" in row]
    found = [row for row in found if "left_out" not in row]
    assert all(set(row) == COLUMNS and re.fullmatch(r"[A-Za-z0-9_-]+", row["key"]) and Path(row["path"]).is_absolute() for row in found)
    assert all(type(row["age"]) is float and row["sex"] in ("male", "female", "") and type(row["site"]) is str for row in found)
    assert len({row["key"] for row in found}) == len(found)
    return found


def fails(message, source, root, *options):
    with pytest.raises(UserError, match=message) as caught:
        rows(source, root, *options)
    assert "\n" not in str(caught.value)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_sources_are_the_modules_of_the_folder():
    assert sorted(SOURCES) == ["cinc", "csv", "heartllm", "mimic", "ptbxl"]
    assert csv.reader is __import__("csv").reader  # sharding/sources/csv.py does not stand in its way
    for module in SOURCES.values():
        assert module.__doc__.splitlines()[0].strip()  # its --help
        assert module.OWN_SPLIT is None or isinstance(module.OWN_SPLIT, str)


# PTB-XL


def ptbxl(root, *records, folders=("records500", "records100")):
    """records: (ecg_id, changes). Only the folders exist: sources read tables, not records."""
    for name in folders:
        (root / name).mkdir(parents=True)
    table = [
        {
            "ecg_id": i, "patient_id": 770000.0 + i, "age": 56.0, "sex": 1, "recording_date": "1990-05-13 10:15:03", "strat_fold": 3,
            "report": "sinusrhythmus  möglich Edit: NORM 100", "scp_codes": "{'NORM': 100.0, 'SR': 0.0}",
            "filename_lr": f"records100/00000/{i:05d}_lr", "filename_hr": f"records500/00000/{i:05d}_hr", **changes,
        }
        for i, changes in records
    ]  # fmt: skip
    pd.DataFrame(table).to_csv(root / "ptbxl_database.csv", index=False)
    return root


def test_ptbxl_rows(tmp_path):
    other, again = {"age": 300.0, "sex": 0, "strat_fold": 9, "report": np.nan}, {"strat_fold": 10, "patient_id": 770001.0}
    root = ptbxl(tmp_path / "ptb-xl-1.0.3", (1, {}), (2, other), (3, again))
    one, two, three = rows("ptbxl", tmp_path)
    assert one == {
        "key": "ptbxl_00001", "source": "ptbxl", "record_id": "1", "patient": pseudonym("ptbxl", 770001), "split": "train",
        "path": str(root / "records500/00000/00001_hr"), "array": "", "report": "sinusrhythmus  möglich Edit: NORM 100", "labels": ["NORM", "SR"],
        "age": 56.0, "sex": "female", "site": "",
    }  # fmt: skip
    assert (two["split"], two["sex"], two["report"]) == ("valid", "male", "") and np.isnan(two["age"])
    assert three["split"] == "test" and three["patient"] == one["patient"]


@pytest.mark.parametrize(
    ("written", "sites"),
    [
        (["0.0", "", "51.0"], ["0", "", "51"]),  # as in PTB-XL, whose column has gaps
        (["0", "7", "51"], ["0", "7", "51"]),
        (["1e1", "2.000", "nan"], ["10", "2", ""]),
        (["", "", ""], ["", "", ""]),
    ],
)
def test_ptbxl_site_is_a_whole_number_as_text(tmp_path, written, sites):
    root = ptbxl(tmp_path, *((i, {"site": site}) for i, site in enumerate(written)))
    assert [row["site"] for row in rows("ptbxl", root)] == sites


def test_ptbxl_site_that_is_no_number_is_named(tmp_path):
    fails("ecg_id 1: .*site.* is wrong", "ptbxl", ptbxl(tmp_path, (1, {"site": "ward"})))


def test_ptbxl_sampling_rate(tmp_path):
    both, low = ptbxl(tmp_path / "both", (1, {})), ptbxl(tmp_path / "low", (1, {}), folders=["records100"])
    hr, lr = "records500/00000/00001_hr", "records100/00000/00001_lr"
    for root, options, path in ((both, (), hr), (both, ("--sampling_rate", 500), hr), (both, ("--sampling_rate", 100), lr), (low, (), lr)):
        assert [row["path"] for row in rows("ptbxl", root, *options)] == [str(root / path)]
    fails("--sampling_rate 500: .* has no records500", "ptbxl", low, "--sampling_rate", 500)


def test_shared_ptbxl(ecg_data):
    if not (ecg_data / "ptbxl_mv").is_dir():
        pytest.skip(f"no {ecg_data / 'ptbxl_mv'}")
    found = rows("ptbxl", ecg_data / "ptbxl_mv")
    assert len(found) == 85 and all(Path(row["path"] + ".hea").is_file() for row in found)
    with open(ecg_data / "ptbxl_mv" / "ptbxl_database.csv", newline="", encoding="utf-8") as table:  # as text, not as pandas reads it
        assert [row["site"] for row in found] == [row["site"].removesuffix(".0") for row in csv.DictReader(table)]
    assert len({row["site"] for row in found}) > 3


# MIMIC-IV-ECG


def mimic(root, measured=None, listed=None, seed=0):
    """Three studies of two patients; machine_measurements.csv in another order than record_list.csv, with none for study 40000003."""
    studies = [(10000001, 40000001, "2180-07-23 08:44:00"), (10000001, 40000002, "2185-01-01 00:00:00"), (10000002, 40000003, "2120-12-31 23:59:00")]
    said = {40000001: {0: "Sinus rhythm", 1: "", 2: "Possible infarct, möglich.", 5: "Abnormal ECG"}, 40000002: {0: "None", 1: "NA"}}
    names = [f"report_{i}" for i in range(18)]
    listing = [
        {"subject_id": s, "study_id": t, "file_name": t, "ecg_time": time, "path": f"files/p{s // 10000}/p{s}/s{t}/{t}"} for s, t, time in studies
    ] + (listed or [])  # fmt: skip
    table = [
        {"subject_id": 0, "study_id": t, "cart_id": 6848296, "ecg_time": "", **{n: said[t].get(i, "") for i, n in enumerate(names)}, "rr_interval": 659}
        for t in (40000002, 40000001)
    ] + (measured or [])  # fmt: skip
    random.Random(seed).shuffle(table)
    root.mkdir(parents=True)
    pd.DataFrame(listing).to_csv(root / "record_list.csv", index=False)
    pd.DataFrame(table).to_csv(root / "machine_measurements.csv", index=False)
    return root


@pytest.mark.parametrize("seed", [0, 1])
def test_mimic_reports_are_joined_by_study(tmp_path, seed):
    root = mimic(tmp_path / "mimic-iv-ecg-diagnostic-electrocardiogram-matched-subset-1.0", seed=seed)
    for where in (root, tmp_path):
        one, two, three = rows("mimic", where)
        assert one | {"age": 0} == {
            "key": "mimic_40000001", "source": "mimic", "record_id": "40000001", "patient": pseudonym("mimic", 10000001), "split": "",
            "path": str(root / "files/p1000/p10000001/s40000001/40000001"), "array": "", "report": "Sinus rhythm. Possible infarct, möglich. Abnormal ECG.",
            "labels": [], "age": 0, "sex": "", "site": "",
        }  # fmt: skip
        assert (two["report"], three["report"]) == ("None. NA.", "")  # words, not missing values
        assert two["patient"] == one["patient"] != three["patient"] and all(np.isnan(row["age"]) for row in (one, two, three))


@pytest.mark.parametrize(
    ("statements", "report"),
    [([], ""), (["", " ", "."], ""), (["a"], "a."), (["a.", "b.."], "a. b."), (["a", "", "b!", " c "], "a. b! c."), (["*** x ***", "y"], "*** x ***. y.")],
)
def test_statements_become_sentences(statements, report):
    assert join_statements(statements) == report


@pytest.mark.parametrize("flag", ["--mimic-iv", "--mimic_iv"])
@pytest.mark.parametrize("name", ["hosp/patients.csv.gz", "hosp/patients.csv", "patients.csv.gz"])
def test_mimic_age_is_that_at_the_ecg(tmp_path, name, flag):
    root, text = mimic(tmp_path / "ecg"), "subject_id,gender,anchor_age,anchor_year,dod\n10000001,F,86,2182,\n10000002,M,91,2122,2125-01-01\n"
    path = tmp_path / "mimiciv" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    one, two, three = rows("mimic", root, flag, tmp_path / "mimiciv")
    assert (one["age"], one["sex"], three["sex"]) == (84.0, "female", "male")
    assert two["age"] == 89.0 and np.isnan(three["age"])  # 91 stands for everyone over 89: two years before it may be 95
    fails("--mimic-iv .* has no hosp/patients.csv.gz", "mimic", root, flag, tmp_path)


def test_mimic_errors_name_the_file_and_the_study(tmp_path):
    fails("--root .* has no record_list.csv", "mimic", tmp_path)
    fails("machine_measurements.csv has two rows for study_id 40000001", "mimic", mimic(tmp_path / "a", measured=[{"study_id": 40000001}]))
    again = {"subject_id": 1, "study_id": 40000003, "ecg_time": "2120-12-31", "path": "files/x"}
    fails("record_list.csv has two rows for study_id 40000003", "mimic", mimic(tmp_path / "b", listed=[again]))
    for i, change in enumerate(({"path": ""}, {"ecg_time": ""})):
        fails("study_id 40000009: path or ecg_time is wrong", "mimic", mimic(tmp_path / f"c{i}", listed=[{**again, "study_id": 40000009, **change}]))
    fails("record_list.csv is not readable", "mimic", mimic(tmp_path / "d", listed=[{**again, "subject_id": "x"}]))
    root = mimic(tmp_path / "e")
    write(root / "record_list.csv", "subject_id,study_id,ecg_time\n")
    fails("record_list.csv has no column path", "mimic", root)
    (root / "record_list.csv").write_bytes(b"")
    fails("record_list.csv is not readable", "mimic", root)
    (root / "machine_measurements.csv").unlink()
    fails("has no machine_measurements.csv", "mimic", root)
    root = mimic(tmp_path / "f")
    damaged = tmp_path / "hosp" / "patients.csv.gz"
    damaged.parent.mkdir()
    damaged.write_bytes(gzip.compress(b"subject_id,gender,anchor_age,anchor_year\n" + b"1,F,1,1\n" * 9999)[:-20])
    fails("patients.csv.gz is not readable", "mimic", root, "--mimic-iv", tmp_path)


# PhysioNet/CinC Challenge


def header(folder, name, comments):
    leads = "".join(f"{name}.mat 16+24 1000/mV 16 0 0 0 0 {lead}\n" for lead in LEADS)
    return write(folder / f"{name}.hea", f"{name} 12 500 5000 05-May-2020 09:49:17\n{leads}{comments}")


def test_cinc_reads_both_years(tmp_path):
    header(tmp_path / "training/georgia/g1", "E00001", "# Age: 74\n# Sex: Female\n# Dx: 59118001,17338001\n# Rx: Unknown\n")
    header(tmp_path / "training/cpsc_2018/g1", "A0001", "#Age: 74\n#Sex: Male\n#Dx: 59118001\n#Rx: Unknown\n")
    header(tmp_path / "training/chapman_shaoxing/g1", "JS00001", "# Age: NaN\n# Sex: Unknown\n# Dx: \n")
    header(tmp_path / "training/st_petersburg_incart/g1", "I0001", "")
    header(tmp_path / "training/ptb/g1", "S0001", "# Age: 300\n# Sex: F\n# Dx: Unknown\n")
    found = {row["record_id"]: row for row in rows("cinc", tmp_path)}
    assert list(found) == ["JS00001", "A0001", "E00001", "S0001", "I0001"]  # in order of their paths
    assert found["E00001"] == {
        "key": "cinc_E00001", "source": "cinc", "record_id": "E00001", "patient": pseudonym("cinc", "E00001"), "split": "",
        "path": str(tmp_path / "training/georgia/g1/E00001"), "array": "", "report": "", "labels": ["59118001", "17338001"], "age": 74.0, "sex": "female",
        "site": "georgia",
    }  # fmt: skip
    assert (found["A0001"]["age"], found["A0001"]["sex"], found["A0001"]["labels"]) == (74.0, "male", ["59118001"])
    assert all(np.isnan(found[name]["age"]) and found[name]["labels"] == [] for name in ("JS00001", "I0001", "S0001"))
    assert [found[name]["sex"] for name in ("JS00001", "I0001", "S0001")] == ["", "", "female"]


@pytest.mark.parametrize(
    ("record", "site"),
    [
        ("A0001", "cpsc_2018"), ("Q0001", "cpsc_2018_extra"), ("I0001", "st_petersburg_incart"), ("S0001", "ptb"), ("HR00001", "ptb-xl"),
        ("E00001", "georgia"), ("JS00001", "chapman_shaoxing"), ("JS10646", "chapman_shaoxing"), ("JS10647", "ningbo"), ("JS45551", "ningbo"),
        ("E0001", ""), ("mine", ""), ("xA0001", ""),
    ],
)  # fmt: skip
def test_cinc_site_is_the_database_of_the_records_name(tmp_path, record, site):
    header(tmp_path / "somewhere", record, "")
    assert [row["site"] for row in rows("cinc", tmp_path, "--with_ptbxl")] == [site]


def test_cinc_leaves_ptbxl_out_and_says_so(tmp_path):
    header(tmp_path / "ptb-xl/g1", "HR00001", "# Age: 74\n")
    fails("holds PTB-XL alone", "cinc", tmp_path)
    header(tmp_path / "georgia", "E00001", "# Age: 74\n")
    assert [row["key"] for row in rows("cinc", tmp_path)] == ["cinc_E00001"]
    assert len(left_out) == 1 and left_out[0].startswith("of PTB-XL")
    assert len(rows("cinc", tmp_path, "--with_ptbxl")) == 2 and left_out == []


def test_cinc_errors(tmp_path):
    fails("has no .hea file", "cinc", tmp_path)
    header(tmp_path / "2020", "E00001", "")
    header(tmp_path / "2021", "E00001", "")
    fails(f"{tmp_path}/2020 and {tmp_path}/2021 both have a record E00001", "cinc", tmp_path)
    header(tmp_path / "2021", "Hans Meyer", "")
    fails("Hans Meyer.hea: a record's name", "cinc", tmp_path / "2021")


def test_shared_cinc(ecg_data):
    if not (ecg_data / "cinc2021").is_dir():
        pytest.skip(f"no {ecg_data / 'cinc2021'}")
    found = rows("cinc", ecg_data / "cinc2021")
    assert len(found) == 158
    assert {row["site"] for row in found} == {"georgia", "chapman_shaoxing", "ningbo"}
    for row in random.Random(0).sample(found, 10):  # against wfdb's reading of the comments
        said = dict(comment.split(": ", 1) for comment in wfdb.rdheader(row["path"]).comments if ": " in comment)
        assert row["labels"] == said["Dx"].split(",") and row["sex"] == said["Sex"].lower()
        assert row["age"] == float(said["Age"]) or np.isnan(row["age"]) and said["Age"] in ("NaN", "Unknown")
    assert read_record(found[0]["path"]).shape == (12, 5000)


# Own csv


def test_csv_rows(tmp_path):
    write(tmp_path / "b" / "two.hea", "")
    table = write(
        tmp_path / "ecgs.csv",
        "\ufeffPath;patient;id;split;report;labels;age;sex;sampling_rate;unit;leads;ward;Site\n"
        'a/one.hea;Müller, Hans;e-1;train;"möglich; kein ""Q""\nzweite Zeile";AF|LBBB;63,5;f;;;;7; Haus B, seit 12.5.2019\n'
        "b/two.mat;7;;test;;;;;;;;7;\n"
        '/elsewhere/three.npy;7;p.3;valid;;"AF ; SR";;Male;257;uV;I II,III|aVR;7;21\n'
        "\n"
        "c/four.mat;8;;;;;nan;unknown;;;;;MAC-5500\n",
    )
    for options in ((), ("--table", table)):
        one, two, three, four = rows("csv", tmp_path, *options)
        assert one == {
            "key": "csv_e-1", "source": "csv", "record_id": "e-1", "patient": pseudonym("csv", "Müller, Hans"), "split": "train",
            "path": str(tmp_path / "a/one"), "array": "", "report": 'möglich; kein "Q"\nzweite Zeile', "labels": ["AF", "LBBB"], "age": 63.5, "sex": "female",
            "site": "Haus B, seit",
        }  # fmt: skip
        assert (two["path"], two["array"], two["split"], two["report"]) == (str(tmp_path / "b/two"), "", "test", "")  # .hea + .mat is WFDB
        assert three["path"] == "/elsewhere/three.npy" and three["labels"] == ["AF", "SR"] and three["sex"] == "male"
        assert json.loads(three["array"]) == {"sampling_rate": 257, "unit": "uV", "leads": ["I", "II", "III", "aVR"]}
        assert four["path"] == str(tmp_path / "c/four.mat") and four["split"] == four["sex"] == "" and np.isnan(four["age"])
        assert json.loads(four["array"]) == {"sampling_rate": 500, "unit": "mV", "leads": list(LEADS)}
        assert [row["site"] for row in (two, three, four)] == ["", "21", "MAC-5500"]
        assert two["patient"] == three["patient"] != four["patient"]
        for row in (two, three, four):  # no id, or one that might be a name: known by a hash of the path
            assert re.fullmatch("[0-9a-f]{16}", row["record_id"]) and row["key"] == f"csv_{row['record_id']}"
    name, *_ = rows("csv", tmp_path, "--name", "hospital-2", "--sampling_rate", "257.5", "--unit", "uV", "--leads", "I,II")
    assert (name["key"], name["source"], name["patient"]) == ("hospital-2_e-1", "hospital-2", pseudonym("hospital-2", "Müller, Hans"))
    *_, four = rows("csv", tmp_path, "--sampling_rate", "257.5", "--unit", "uV", "--leads", "I,II")
    assert json.loads(four["array"]) == {"sampling_rate": 257.5, "unit": "uV", "leads": ["I", "II"]}


@pytest.mark.parametrize("name", ["Hospital", "a b", "", "ä"])
def test_csv_source_names_are_plain(name):
    parser = argparse.ArgumentParser()
    SOURCES["csv"].add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--name", name])


def test_an_array_of_a_csv_can_be_read(tmp_path):
    ecg = np.random.default_rng(0).normal(0, 0.3, (12, 5000)).astype(np.float32)
    np.save(tmp_path / "one.npy", ecg[::-1] * 1000)
    write(tmp_path / "ecgs.csv", f"path,patient,unit,leads\none.npy,1,uV,{' '.join(LEADS[::-1])}\n")
    [row] = rows("csv", tmp_path)
    np.testing.assert_allclose(read_record(row["path"], 0.0, row["array"]), ecg, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column path and no column patient"),
        ("path,patent\n", "has no column patient"),
        ("path,patient\n", "has a header and no rows"),
        ("path,patient,path\n", "two columns named path"),
        ("path,patient\na,1\n,2\n", "line 3: path is empty"),
        ("path,patient\na,1\nb, \n", "line 3: patient is empty"),
        ("path,patient\na,1\nb\n", "line 3 has 1 cells, the header has 2"),
        ("path,patient\n../a,1\n", "line 2: its path leaves --root"),
        ("path,patient,split\na,1,training\n", "line 2: split 'training'"),
        ("path,patient,id\na,1,x\nb,1,x\n", "line 3: its id stands in line 2 too"),
        ("path,patient\na,1\na.hea,2\n", "line 3: its path stands in line 2 too"),
        ("path,patient,age\na,1,old\n", "line 2: age 'old'"),
        ("path,patient,age\na,1,200\n", "line 2: age '200'"),
        ("path,patient,sex\na,1,1\n", "line 2: sex '1'"),
        ("path,patient,sampling_rate\na.npy,1,0\n", "line 2: sampling_rate 0"),
        ("path,patient,sampling_rate\na.npy,1,fast\n", "line 2: sampling_rate fast"),
        ('path,patient\n"a,1\n', "is not readable"),
        (b"path,patient\n\xfc,1\n", "is not UTF-8"),
    ],
)
def test_csv_errors_name_the_line(tmp_path, text, message):
    (tmp_path / "ecgs.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    fails(f"ecgs.csv.* ?{message}", "csv", tmp_path)


def test_csv_table_must_be_one(tmp_path):
    fails("has 0 .csv files: .* --table", "csv", tmp_path)
    for name in ("a", "b"):
        write(tmp_path / f"{name}.csv", "path,patient\nx,1\n")
    fails("has 2 .csv files: .* --table", "csv", tmp_path)
    assert len(rows("csv", tmp_path, "--table", tmp_path / "b.csv")) == 1
    fails("absent.csv is not readable", "csv", tmp_path, "--table", tmp_path / "absent.csv")


# HeartLLM's release


BACKGROUND = {"patient_id": 770001.0, "background": "Patient Information: - Patient ID: 770001; Recording Date: 1990-05-13 10:15:03."}


def test_heartllm_rows_agree_with_ptbxl(tmp_path):
    root = ptbxl(tmp_path / "ptb-xl", *((i, {}) for i in range(1, 6)))
    known = {row["record_id"]: row for row in rows("ptbxl", root)}
    paths = [f"records500/00000/{i:05d}_hr" for i in range(9)]
    train = write(tmp_path / "report/train.json", json.dumps([{**BACKGROUND, "ecg_id": i, "report": f"report {i}", "filepath": paths[i]} for i in (2, 1, 8)]))
    question = {"question": "?", "answer": ["yes"]}
    valid = write(tmp_path / "qa/template_valid_background.json", json.dumps([{**question, **BACKGROUND, "ecg_path": paths[i]} for i in (3, 3, 2)]))
    found = rows("heartllm", root, "--json", train, valid)
    assert found == [
        known["1"] | {"split": "train", "report": "report 1"},
        known["2"] | {"split": "train and valid", "report": "report 2"},
        known["3"] | {"split": "valid", "report": ""},
    ]
    assert left_out == ["that --json names and --root does not have"]
    assert "1990" not in str(found) and "770001" not in str(found)
    assert rows("heartllm", root, "--json", train, "--sampling_rate", 100)[0]["path"].endswith("_lr")


def test_heartllm_rows_agree_with_mimic(tmp_path):
    root = mimic(tmp_path / "mimic")
    glued = "Sinus rhythm.Possible infarct, möglich..Abnormal ECG."
    rows_ = [{**BACKGROUND, "ecg_id": 40000001, "report": glued, "filepath": "p1000/p10000001/s40000001/40000001"}]
    test = write(tmp_path / "test.json", json.dumps(rows_))
    [found], one = rows("heartllm", tmp_path, "--json", test), rows("mimic", root)[0]
    assert {**found, "age": 0} == {**one, "age": 0, "split": "test"}  # the report, too
    other = write(tmp_path / "x" / "train.json", json.dumps([{**rows_[0], "filepath": "records500/00000/00001_hr"}]))
    fails("--json: none of 1 ECGs is in --root", "heartllm", root, "--json", other)
    fails("its name must hold one of train, valid and test", "heartllm", root, "--json", write(tmp_path / "rows.json", "[]"))
    fails("its name must hold one of", "heartllm", root, "--json", write(tmp_path / "train_test.json", "[]"))
    fails("has neither ptbxl_database.csv nor record_list.csv", "heartllm", tmp_path / "x", "--json", other)

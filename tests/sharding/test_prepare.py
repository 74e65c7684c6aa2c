import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import wfdb

from sharding import prepare
from sharding.manifest import FILES, SCHEMA, pseudonym, read_manifest, write_manifest
from toolkit.ecg.leads import LEADS
from toolkit.ecg.quality import check
from toolkit.ecg.records import read_record
from toolkit.errors import UserError

REPO = Path(__file__).parents[2]
DATA = Path(os.environ.get("ECG_DATA", REPO / "../shared/data"))
UPPER = [lead.upper() for lead in LEADS]  # as PTB-XL writes them


def signal(seconds=10, rate=500, seed=0):
    return np.cumsum(np.random.default_rng(seed).normal(0, 0.02, (seconds * rate, 12)), axis=0)


def record(root, ecg_id, data, rate=500, names=UPPER, units="mV", gain=1000.0):
    """Write a record as a real download has it (format 16, one .dat); returns its row of ptbxl_database.csv."""
    files = {kind: f"records{hz}/{ecg_id // 1000 * 1000:05d}/{ecg_id:05d}_{kind}" for kind, hz in (("hr", 500), ("lr", 100))}
    if data is not None:
        path, n = root / files["hr" if rate == 500 else "lr"], data.shape[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        wfdb.wrsamp(
            path.name, fs=rate, units=[units] * n, sig_name=list(names), p_signal=data, fmt=["16"] * n, adc_gain=[gain] * n,
            baseline=[0] * n, write_dir=str(path.parent),
        )  # fmt: skip
    return {
        "ecg_id": ecg_id, "patient_id": 770000.0 + ecg_id, "age": 56.0, "sex": 1, "report": "sinusrhythmus  normales ekg",
        "scp_codes": "{'NORM': 100.0, 'SR': 0.0}", "strat_fold": 3, "filename_lr": files["lr"], "filename_hr": files["hr"],
    }  # fmt: skip


def table(root, rows):
    root.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(root / "ptbxl_database.csv", index=False)
    return root


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A PTB-XL of fourteen records, six of them unusable."""
    root = tmp_path_factory.mktemp("damaged") / "ptb-xl"
    nan_short, nan_long, flat = signal(seed=3), signal(seed=4), signal(seed=5)
    nan_short[50:60, 1] = nan_long[50:200, 1] = np.nan
    flat[1000:4000, 4] = 0.5
    order = [3, 0, 1, 2, 5, 4, 11, 10, 9, 8, 7, 6]
    rows = [
        record(root, 1, signal()) | {"report_en": "  "},
        record(root, 2, signal()[:, order], names=[LEADS[i] for i in order]) | {"site": 7.0},
        record(root, 3, signal() * 1000, units="uV", gain=1.0),
        record(root, 4, nan_short) | {"strat_fold": 9, "age": 300.0, "sex": 0},
        record(root, 5, signal(seconds=30)) | {"strat_fold": 10},
        record(root, 6, signal(seconds=7)) | {"age": np.nan, "report": np.nan, "scp_codes": "{}"},
        record(root, 1007, signal()) | {"patient_id": 770001.0, "report": "trace only requested.", "report_en": " trace only requested. "},
        record(root, 1008, signal()) | {"report_en": "sinus rhythm.\n normal ecg."},
        record(root, 9, nan_long),
        record(root, 10, flat),
        record(root, 11, signal()[:, :11], names=UPPER[:11]),
        record(root, 12, signal()),
        record(root, 13, None),
        record(root, 14, signal(seconds=3)),
    ]
    data = root / "records500/00000/00012_hr.dat"
    data.write_bytes(data.read_bytes()[:70_000])
    return table(root, rows)


def run(*args, **kwargs):
    command = [sys.executable, "-m", "sharding.prepare", *map(str, args)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, **kwargs)


def failure(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        prepare.main([str(arg) for arg in ("ptbxl", *args)])
    assert caught.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_every_record_is_kept_or_quarantined_with_its_reason(damaged, tmp_path):
    out = tmp_path / "runs" / "m"
    done = run("ptbxl", "--root", damaged, "--out", out, "--workers", 2)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "8 of 14 ECGs kept, 6 with a report" in done.stdout
    assert os.listdir(out.parent) == ["m"] and sorted(os.listdir(out)) == sorted([*FILES, "parts"])

    frame = read_manifest(out).set_index("record_id")
    assert list(frame.reset_index()[SCHEMA.names].key) == [f"ptbxl_{i:05d}" for i in (1, 2, 3, 4, 5, 6, 1007, 1008)]
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert {line["key"][6:]: line["reason"] for line in lines} == {
        "00009": "nan", "00010": "flat_lead", "00011": "missing_lead", "00012": "unreadable", "00013": "absent", "00014": "too_short",
    }  # fmt: skip
    assert all(line["message"] and line["path"] == str(damaged / f"records500/00000/{line['key'][6:]}_hr") for line in lines)

    assert frame.split.to_dict() == dict.fromkeys(["1", "2", "3", "6", "1007", "1008"], "train") | {"4": "valid", "5": "test"}
    assert frame.patient["1"] == frame.patient["1007"] == pseudonym("ptbxl", 770001) != frame.patient["2"]
    assert frame.patient.str.fullmatch("[0-9a-f]{16}").all()
    assert frame.report.to_dict() == dict.fromkeys(["1", "2", "3", "4", "5"], "sinusrhythmus normales ekg") | {
        "6": "", "1007": "", "1008": "sinus rhythm. normal ecg.",
    }  # fmt: skip
    assert frame["labels"]["1"] == ["NORM", "SR"] and frame["labels"]["6"] == []
    assert frame.qc.to_dict() == dict.fromkeys(["1", "2", "3", "5", "1007", "1008"], []) | {"4": ["nan_interpolated"], "6": ["padded"]}
    assert frame.age["1"] == 56 and np.isnan(frame.age[["4", "6"]]).all()
    assert frame.sex["1"] == "female" and frame.sex["4"] == "male"
    assert frame.site.to_dict() == dict.fromkeys(frame.index, "") | {"2": "7"}
    # The same signal in another order, in uV, and as the start of a long record.
    for other in ("2", "3"):
        np.testing.assert_allclose(read_record(frame.path[other]), read_record(frame.path["1"]), atol=0.001)
    # A patient number stands in no file: only its pseudonym.
    texts = [frame.reset_index().to_csv(), *((out / name).read_text() for name in FILES if name != "manifest.parquet")]
    assert not any(re.search(r"\b7700\d\d", text) for text in texts)

    summary = json.loads((out / "prepare.json").read_text())
    assert (summary["records"], summary["kept"], summary["reports"], summary["format_version"]) == (14, 8, 6, 3)
    assert summary["quarantined"] == {"absent": 1, "flat_lead": 1, "missing_lead": 1, "nan": 1, "too_short": 1, "unreadable": 1}
    assert summary["flags"] == {"nan_interpolated": 1, "padded": 1}
    assert summary["splits"] == {
        "train": {"ecgs": 6, "patients": 5},
        "valid": {"ecgs": 1, "patients": 1},
        "test": {"ecgs": 1, "patients": 1},
    }
    assert summary["labels"] == {"NORM": 7, "SR": 7}


def test_workers_do_not_change_the_result(damaged, tmp_path):
    for workers in ("1", "2"):
        prepare.main(["ptbxl", "--root", str(damaged), "--out", str(tmp_path / workers), "--workers", workers])
    for name in ("manifest.parquet", "quarantine.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_complete_manifest_is_made_once(tmp_path, capsys):
    root, out = tmp_path / "ptb-xl", tmp_path / "m"
    rows = [record(root, i, signal(seed=i)) for i in (1, 2, 3)]
    table(root, rows)
    args = ["--root", tmp_path, "--out", out]  # the folder above: the csv is in its one subfolder
    prepare.main(["ptbxl", *map(str, args), "--limit", "2"])
    first = {name: (out / name).read_bytes() for name in FILES}
    capsys.readouterr()
    prepare.main(["ptbxl", *map(str, args), "--limit", "2"])
    assert "is complete: 2 ECGs" in capsys.readouterr().out

    assert "--overwrite" in failure(capsys, *args)  # no --limit now
    assert {name: (out / name).read_bytes() for name in FILES} == first
    prepare.main(["ptbxl", *map(str, args), "--overwrite"])
    assert len(read_manifest(out)) == 3
    table(root, rows[:1])
    assert "--overwrite" in failure(capsys, *args)  # another table
    (root / "records500/00000/00003_hr.dat").unlink()
    table(root, rows)
    prepare.main(["ptbxl", *map(str, args), "--overwrite"])  # the same arguments and table: made again all the same
    assert len(read_manifest(out)) == 2 and sorted(os.listdir(tmp_path)) == ["m", "ptb-xl"]

    (out / "mine.txt").write_text("precious")
    assert "mine.txt" in failure(capsys, *args, "--overwrite")
    assert (out / "mine.txt").read_text() == "precious"


def test_100_hz_alone_will_do(tmp_path):
    root = tmp_path / "ptb-xl"
    table(root, [record(root, 1, signal(rate=100), rate=100)])
    prepare.main(["ptbxl", "--root", str(root), "--out", str(tmp_path / "m")])
    [path] = read_manifest(tmp_path / "m").path
    assert path == str(root / "records100/00000/00001_lr")
    assert check(read_record(path))[0].shape == (12, 5000)


def test_wrong_root_is_one_line_and_exit_code_2(tmp_path, capsys):
    done = run("ptbxl", "--root", tmp_path, "--out", tmp_path / "m")
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and f"--root {tmp_path} has no ptbxl_database.csv" in line
    assert "is no folder" in failure(capsys, "--root", tmp_path / "absent", "--out", tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_used_is_named(tmp_path, capsys):
    root, out = tmp_path / "ptb-xl", tmp_path / "m"
    args = ["--root", root, "--out", out]
    row = record(root, 1, None)

    table(root, [row])
    assert "neither records500 nor records100" in failure(capsys, *args)
    (root / "records500").mkdir()
    line = failure(capsys, *args)
    assert "none of 1 records" in line and "--root" in line and "absent" in line
    row = record(root, 1, signal())
    table(root, [row, row])
    assert "2 rows are called ptbxl_00001" in failure(capsys, *args)
    table(root, [row]).joinpath("ptbxl_database.csv").write_text(",".join(row) + "\n")
    assert "has no rows" in failure(capsys, *args)
    for column, value in {"strat_fold": 11, "patient_id": np.nan, "scp_codes": "{'NORM': ", "filename_hr": np.nan, "age": "old"}.items():
        table(root, [row | {column: value}])
        assert column in failure(capsys, *args)
    table(root, [{name: row[name] for name in row if name != "scp_codes"}])
    assert "no column scp_codes" in failure(capsys, *args)
    for damage in (b"", b'ecg_id,"\n1,2,3\n', b"\xff\xfe\x00"):
        (root / "ptbxl_database.csv").write_bytes(damage)
        failure(capsys, *args)
    (root / "ptbxl_database.csv").unlink()
    for name in ("a", "b"):
        table(root / name, [row])
    assert "2 subfolders" in failure(capsys, *args)
    shutil.rmtree(out)
    table(root, [row])
    out.write_text("a file")
    assert "--out" in failure(capsys, *args) and out.read_text() == "a file"
    assert "--out" in failure(capsys, "--root", root, "--out", out / "m")


def test_read_manifest_names_the_argument_and_the_mend(tmp_path):
    row = dict.fromkeys(SCHEMA.names, "x") | {"labels": ["NORM"], "qc": [], "age": float("nan"), "start": 0.0}
    out = tmp_path / "split=train"  # such names make pyarrow's readers add a column
    out.mkdir()
    write_manifest(out, [row], [], {})
    frame = read_manifest(out)
    assert list(frame) == SCHEMA.names and frame["labels"][0] == ["NORM"] and np.isnan(frame.age[0])

    def message():
        with pytest.raises(UserError, match=f"--manifest {re.escape(str(out))}.*sharding.prepare") as caught:
            read_manifest(out)
        return str(caught.value)

    parquet = (out / "manifest.parquet").read_bytes()
    (out / "manifest.parquet").write_bytes(parquet[:-100])
    assert "damaged" in message()
    pd.DataFrame({"key": ["x"]}).to_parquet(out / "manifest.parquet")
    assert "damaged" in message()
    (out / "manifest.parquet").unlink()
    assert "has no manifest.parquet" in message()
    (out / "manifest.parquet").write_bytes(parquet)
    for text in ('{"format_version": 1}', "[]", "{"):
        (out / "prepare.json").write_text(text)
        assert "format version" in message()
    (out / "prepare.json").unlink()
    assert "has no prepare.json" in message()


def test_a_manifest_of_format_2_has_sites_unknown(tmp_path):
    row = dict.fromkeys(SCHEMA.names, "x") | {"labels": ["NORM"], "qc": [], "age": 50.0, "start": 0.0}
    write_manifest(tmp_path, [row], [], {})
    new = read_manifest(tmp_path)
    pq.write_table(pq.read_table(tmp_path / "manifest.parquet").drop_columns(["site"]), tmp_path / "manifest.parquet")
    with pytest.raises(UserError, match="is damaged .columns key, source"):  # it says that it is of format 3
        read_manifest(tmp_path)
    (tmp_path / "prepare.json").write_text('{"format_version": 2}')
    assert read_manifest(tmp_path).equals(new.assign(site=""))


def test_pseudonyms_never_change():
    """Manifests are joined by patient, so the value is part of the format: blake2s of "heartspeed:ptbxl:9012", 8 bytes."""
    assert pseudonym("ptbxl", 9012) == "bdd013c9d3597ec9" != pseudonym("mimic", 9012)


def test_shared_ptbxl(tmp_path):
    if not (DATA / "ptbxl_mv").is_dir():
        pytest.skip(f"no {DATA / 'ptbxl_mv'}: set ECG_DATA")
    prepare.main(["ptbxl", "--root", str(DATA / "ptbxl_mv"), "--out", str(tmp_path / "m")])
    frame = read_manifest(tmp_path / "m")
    assert len(frame) == 85 and frame.split.value_counts().to_dict() == {"train": 74, "valid": 11}
    assert not frame.report.str.contains("Edit|bericht|trace only").any()

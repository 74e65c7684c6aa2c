"""Task shards: every task is in them or in left_out.jsonl, and age and sex go with each ECG."""

import json

import numpy as np
import pytest
import torch

from sharding import shard_tasks, verify
from toolkit.errors import UserError
from toolkit.shards.reader import Shards
from toolkit.shards.writer import write_index, write_split
from toolkit.tasks.ecgqa import read_ecgqa
from toolkit.tasks.join import ECGs, join, left_out, samples
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig

PEOPLE = {  # record id -> split, age, sex, report
    "1": ("train", 63.0, "female", "sinus rhythm."),
    "2": ("train", 300, "male", ""),
    "3": ("train", 90.0, "", "pacemaker."),
    "4": ("train", None, "male", "sinus rhythm."),
    "5": ("test", 89.0, "female", "sinus rhythm."),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    torch.manual_seed(0)
    ECGTokenizer(TokenizerConfig()).save_pretrained(folder)
    return folder


@pytest.fixture
def shards(tmp_path, tokenizer):
    folder, splits = tmp_path / "shards", {}
    for split in ("train", "test"):
        splits[split] = write_tokens(folder, split, [(record, *row[1:]) for record, row in PEOPLE.items() if row[0] == split])
    (folder / "tokenizer").mkdir()
    for file in tokenizer.iterdir():
        (folder / "tokenizer" / file.name).write_bytes(file.read_bytes())
    once = {"tokenizer": ECGTokenizer.from_pretrained(tokenizer).fingerprint(), "tokens_per_ecg": 313, "codes": 1296, "levels": [6, 6, 6, 6]}
    write_index(folder, splits, kind="tokens", manifest="../manifest", shard_size=2, **once)
    return folder


def write_tokens(folder, split, people):
    folder.mkdir(exist_ok=True)
    rows = []
    for record, age, sex, report in people:
        meta = {"record_id": record, "source": "x", "split": split, "patient": f"patient-{record}", "report": report, "gains": [[0.1] * 12]}
        rows.append((f"x_{record}", np.full((1, 313), int(record), np.uint16), {**meta, "age": age, "sex": sex}))
    return write_split(folder, split, rows, 2)


def qa(folder, *questions):
    """A folder of ECG-QA files with (sample id, question type, ecg ids, answer) each."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"sample_id": i, "template_id": 1, "question_type": kind, "attribute_type": "scp_code", "question": "?", "answer": answer, "ecg_id": ecgs}
        for i, kind, ecgs, answer in questions
    ]
    (folder / "qa.json").write_text(json.dumps(rows))
    return folder


QUESTIONS = [
    (0, "single-verify", [1], ["yes"]),
    (1, "single-query", [77], ["sinus"]),
    (2, "comparison_consecutive-verify", [2, 1], ["yes"]),
    (3, "comparison_irrelevant-verify", [1, 5], ["no"]),
    (4, "comparison_consecutive-query", [5, 99], ["none"]),
    (5, "comparison_irrelevant-query", [98, 97], ["none"]),
    (6, "single-choose", [5], []),
]
LEFT = [  # id, question type, missing, reason, as a reader of QUESTIONS would say
    ("qa-1", "single-query", ["77"], "ECG not in the shards"),
    ("qa-3", "comparison_irrelevant-verify", [], "its two ECGs are in different splits"),
    ("qa-4", "comparison_consecutive-query", ["99"], "ECG not in the shards"),
    ("qa-5", "comparison_irrelevant-query", ["98", "97"], "ECG not in the shards"),
    ("qa-6", "single-choose", [], "no answer"),
]


def run(*words):
    shard_tasks.main(list(map(str, words)))


def listed(folder):
    return [json.loads(text) for text in (folder / "left_out.jsonl").read_text().splitlines()]


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_is_left_out_is_listed_and_nothing_else(shards, tmp_path, capsys):
    out = tmp_path / "tasks"
    run("ecgqa", "--qa", qa(tmp_path / "qa", *QUESTIONS), "--shards", shards, "--out", out)
    assert [(line["id"], line["question_type"], line["missing"], line["reason"]) for line in listed(out)] == LEFT
    assert {tuple(line) for line in listed(out)} == {("id", "task", "question_type", "missing", "reason")}
    shown = capsys.readouterr().out
    assert f"{out}/left_out.jsonl lists the 5 tasks left out, of all kinds; the first: qa-1, qa-3, qa-4\n" in shown
    assert "        3 ecgqa tasks: left out, ECG not in the shards" in shown and "        2 ecgqa tasks: joined" in shown
    train = Shards.open(out, "train")
    there = [task["id"] for i in range(len(train)) for task in train.meta(i)["tasks"]]
    assert sorted(there + [line["id"] for line in listed(out)]) == sorted(f"qa-{i}" for i in range(7))
    assert "patient" not in (out / "left_out.jsonl").read_text()


def test_lines_agree_with_the_counts_of_join(shards, tmp_path):
    ecgs, tasks = ECGs({split: Shards.open(shards, split) for split in ("train", "test")}), read_ecgqa(qa(tmp_path / "qa", *QUESTIONS))
    joined, counts = join(tasks, ecgs)
    lines = left_out(tasks, ecgs)
    assert counts == {"joined": 2} | {f"left out, {reason}": sum(line["reason"] == reason for line in lines) for reason in {line["reason"] for line in lines}}
    assert sum(map(len, joined.values())) + len(lines) == len(tasks)


def test_lines_of_other_kinds_stay_and_the_same_inputs_give_the_same_bytes(shards, tmp_path):
    rows = [{"ecg_path": "00077_hr", "report": "gone"}, {"ecg_path": "00005_hr", "report": " "}, {"ecg_path": "00001_hr", "report": "sinus rhythm."}]
    (tmp_path / "release.json").write_text(json.dumps(rows))
    questions = ("ecgqa", "--qa", qa(tmp_path / "qa", *QUESTIONS), "--shards", shards)
    reports = ("heartllm", "--qa", tmp_path / "release.json", "--shards", shards)
    one, two = tmp_path / "one", tmp_path / "two"
    run(*questions, "--out", one)
    run(*reports, "--out", one)
    run(*reports, "--out", two)
    assert [line["reason"] for line in listed(two)] == ["no report", "ECG not in the shards"]
    run(*questions, "--out", two)
    assert files(one) == files(two) and "left_out.jsonl" in files(one)
    assert [line["id"] for line in listed(one)] == [id for id, *_ in LEFT] + ["report-5", "report-77"]
    run(*reports, "--out", one)
    assert files(one) == files(two)
    assert verify.verify_shards(str(one), 1)

    run("ecgqa", "--qa", qa(tmp_path / "qa", *QUESTIONS[:1]), "--shards", shards, "--out", one)  # better questions: their old lines go
    assert [line["id"] for line in listed(one)] == ["report-5", "report-77"]


def test_nothing_left_out_is_an_empty_file_and_no_line(shards, tmp_path, capsys):
    run("reports", "--shards", shards, "--out", tmp_path / "tasks")
    assert (tmp_path / "tasks" / "left_out.jsonl").read_bytes() == b"" and "left_out" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"{", b"[]\n", b'{"id": "a"}\n', b"\xff\n"])
def test_a_damaged_list_is_named_and_an_absent_one_is_empty(shards, tmp_path, content):
    out = tmp_path / "tasks"
    reports = ("reports", "--shards", shards, "--out", out)
    run(*reports)
    before = files(out)
    (out / "left_out.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="--out: .*left_out.jsonl is damaged; copy it again, or delete the folder"):
        run(*reports)
    (out / "left_out.jsonl").unlink()
    run(*reports)
    assert files(out) == before


def test_age_and_sex_of_each_ecg_and_no_age_above_90(shards, tmp_path):
    out = tmp_path / "tasks"
    run("ecgqa", "--qa", qa(tmp_path / "qa", *QUESTIONS, (7, "single-verify", [3], ["no"])), "--shards", shards, "--out", out)
    run("reports", "--shards", shards, "--out", out)
    metas = [meta for split in ("train", "test") for meta in map(Shards.open(out, split).meta, range(len(Shards.open(out, split))))]
    told = {tuple(meta["record_ids"]): (meta["ages"], meta["sexes"]) for meta in metas}
    assert told == {
        ("1",): ([63.0], ["female"]), ("2", "1"): ([90.0, 63.0], ["male", "female"]), ("3",): ([90.0], [""]),
        ("4",): ([None], ["male"]), ("5",): ([89.0], ["female"]),
    }  # fmt: skip


def test_site_and_labels_of_each_ecg(tmp_path):
    people = {"1": {"site": "0", "labels": ["NORM", "SR"]}, "2": {"site": "", "labels": []}, "3": {}}  # shards made before have neither
    meta = {"source": "x", "split": "train", "patient": "p", "report": "sinus rhythm.", "gains": [[0.1] * 12]}
    rows = [(f"x_{record}", np.zeros((1, 313), np.uint16), {**meta, "record_id": record, **more}) for record, more in people.items()]
    write_index(tmp_path, {"train": write_split(tmp_path, "train", rows, 2)}, kind="tokens")
    ecgs = ECGs({"train": Shards.open(tmp_path, "train")})
    asked = {"task": "ecgqa", "question_type": "single-verify", "question": "?", "answer": ["yes"]}
    joined, _ = join([{"id": "-".join(pair), **asked, "ecg_ids": pair} for pair in (("2", "1"), ("1", "3"), ("3",), ("1",))], ecgs)
    made = {tuple(meta["record_ids"]): (meta["sites"], meta["labels"]) for _, _, meta in samples("train", joined, ecgs)}
    assert made == {
        ("1",): (["0"], [["NORM", "SR"]]), ("3",): ([""], [[]]), ("2", "1"): (["", "0"], [[], ["NORM", "SR"]]),
        ("1", "3"): (["0", ""], [["NORM", "SR"], []]),
    }  # fmt: skip


def test_tokens_without_age_and_sex_still_make_tasks(tmp_path):
    meta = {"record_id": "1", "source": "x", "split": "train", "patient": "p", "report": "", "gains": [[0.1] * 12]}
    write_index(tmp_path, {"train": write_split(tmp_path, "train", [("x_1", np.zeros((1, 313), np.uint16), meta)], 1)}, kind="tokens")
    ecgs = ECGs({"train": Shards.open(tmp_path, "train")})
    joined, _ = join([{"id": "a", "task": "ecgqa", "question_type": "single-verify", "question": "?", "answer": ["yes"], "ecg_ids": ("1",)}], ecgs)
    ((_, _, made),) = samples("train", joined, ecgs)
    assert (made["ages"], made["sexes"], made["sites"], made["labels"]) == ([None], [""], [""], [[]])

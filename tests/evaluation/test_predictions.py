"""What a file of predictions may be, and what is said of one that is none."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import UserError
from toolkit.evaluation.metrics import is_correct
from toolkit.evaluation.predictions import read_predictions, units


def written(tmp_path, *rows):
    path = tmp_path / "P.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def row(prediction="yes", reference="yes", **more):
    return {"prediction": prediction, "reference": reference, **more}


def test_another_systems_file_is_filled_in(tmp_path):
    path = written(
        tmp_path,
        row(),
        "",
        row(reference=["b", "a"], question_type="single-query"),
        row(prediction=None, template_id=8.0),  # as pandas writes a column with gaps
        row(task="ecgqa", id=17, site=3, patient="x", controls={"flat": None}, question_type=None, labels=["NORM"]),
        row(prediction=float("nan"), question_type="report"),
    )
    first, second, third, fourth, fifth = read_predictions(path)
    assert first == {"prediction": "yes", "reference": "yes", "task": "report", "question_type": "report", "id": "1"}
    assert second == {"prediction": "yes", "reference": "a; b", "task": "ecgqa", "question_type": "single-query", "id": "2"}
    assert third == {"prediction": "", "reference": "yes", "template_id": 8, "task": "ecgqa", "question_type": "unknown", "id": "3"}
    assert isinstance(third["template_id"], int)
    assert (fourth["id"], fourth["site"], fourth["controls"], fourth["question_type"], fourth["labels"]) == ("17", "3", {"flat": ""}, "unknown", ["NORM"])
    assert (fifth["prediction"], fifth["task"], fifth["id"]) == ("", "report", "5")


def test_the_files_of_the_authors_are_read(tmp_path):
    path = written(
        tmp_path,
        {"prediction": ["b", "a"], "answer": ["a", "b"], "question_type": "single-query"},
        {"prediction": ["yes", ""], "gt": "yes", "question_type": "single-verify"},
        {"prediction": ["a; b"], "gt": "a; b", "question_type": "single-query"},
        {"prediction": [], "gt": "yes"},
        {"prediction": "no", "gt": "yes", "predicted": ["yes"]},  # a column of their own
    )
    first, second, third, fourth, fifth = read_predictions(path)
    assert "predicted" not in fifth
    assert (first["prediction"], first["predicted"], first["reference"]) == ("b; a", ["b", "a"], "a; b")
    assert (second["predicted"], second["reference"]) == (["yes", ""], "yes")
    assert [is_correct(one) for one in (first, second, third, fourth)] == [True, True, False, False]  # one answer with a ";" is not two


def test_a_number_is_one_however_it_is_written(tmp_path):
    first, second = read_predictions(written(tmp_path, row(id=1.0, patient=8.0, site=3.0), row(id=2, patient=8, site=3)))
    assert (first["id"], first["site"]) == ("1", "3") and first["site"] == second["site"]
    assert units([first, second])[0].tolist() == [0, 0]
    with pytest.raises(UserError, match="two rows have the id '1'"):
        read_predictions(written(tmp_path, row(id=1.0), row(id=1)))


def test_half_a_character_stops_nothing(tmp_path):
    (found,) = read_predictions(written(tmp_path, row(prediction="sinus \ud83d", question="\U0001f600 \udc00", controls={"\ud83d": "yes"})))
    assert (found["prediction"], found["question"], found["controls"]) == ("sinus \ufffd", "\U0001f600 \ufffd", {"\ufffd": "yes"})


def test_a_json_list_and_lines_are_the_same(tmp_path):
    rows = [row(id="a", question="line\u2028of two\nlines"), row(id="b")]
    path = tmp_path / "P.json"
    path.write_text("\ufeff\n" + json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    lines = tmp_path / "P.jsonl"
    lines.write_text("\r\n".join(json.dumps(one, ensure_ascii=False) for one in rows), encoding="utf-8")
    assert read_predictions(path) == read_predictions(lines) and read_predictions(path)[0]["question"] == rows[0]["question"]


@pytest.mark.parametrize(
    "rows, says",
    [
        ([row(), {"reference": "a", "answer": "b"}], "line 2: the column 'prediction' is missing; it has 'reference', 'answer'"),
        ([{"prediction": "a"}], "line 1: the column 'reference' is missing"),
        ([{}], "line 1: the column 'prediction' is missing; it has none"),
        ([row(prediction=["yes", 3])], r"line 1: prediction is text; got \['yes', 3\]"),
        ([row(prediction=3)], "line 1: prediction is text; got 3"),
        ([row(reference=[1])], r"line 1: reference is text, or a list of answers; got \[1\]"),
        ([row(reference=None)], "line 1: reference is text, or a list of answers; got None"),
        ([row(reference=" ")], "line 1: reference is empty"),
        ([row(reference=[])], "line 1: reference is empty"),
        ([row(task="reports")], "line 1: the task 'reports' is neither 'ecgqa' nor 'report'"),
        ([row(question_type=["a"])], "line 1: question_type is text"),
        ([row(template_id="8")], "line 1: template_id is a whole number; got '8'"),
        ([row(template_id=True)], "line 1: template_id is a whole number"),
        ([row(sample=0.5)], "line 1: sample is a whole number"),
        ([row(patient=[3])], "line 1: patient is a number or text"),
        ([row(ecg_id={"a": 1})], "line 1: ecg_id is a number or text"),
        ([row(reference=["a; b"])], "line 1: reference holds the answer 'a; b', but ';' is what parts answers"),
        ([row(reference=";")], "line 1: reference is empty"),
        ([{"prediction": "a", "gt": " "}], "line 1: gt is empty"),
        ([row(controls={"model": "no"})], "line 1: a control may not be called 'model'"),
        (["[" * 100_000], "begins as a JSON list but is none"),
        (['{"a":' * 100_000], "line 1 is not JSON"),
        ([row(controls=["no"])], "line 1: controls is an object"),
        ([row(controls={"flat": 3})], r"line 1: controls\['flat'\] is text; got 3"),
        ([row(id="a"), row(id="b"), row(id="a")], "two rows have the id 'a'"),
        ([row(), "", '{"prediction": "a", "ref'], "line 3 is not JSON"),
        (["3"], "line 1: an object is needed.*got int"),
        (["[1]"], "row 1: an object is needed.*got int"),
        (["[{"], "begins as a JSON list but is none"),
        ([""], "holds no prediction"),
        (["[]"], "holds no prediction"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, rows, says):
    path = written(tmp_path, *rows)
    with pytest.raises(UserError, match=says) as error:
        read_predictions(path, "--other")
    assert str(error.value).startswith(f"--other: {path}")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="--predictions: .*none.jsonl cannot be read: No such file"):
        read_predictions(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="it is not UTF-8 text"):
        read_predictions(tmp_path / "binary")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_predictions(tmp_path)


def test_what_an_interval_is_over():
    def of(*rows):
        places, kind = units(rows)
        return places.tolist(), kind

    assert of({"patient": 4, "sample": 0}, {"patient": 2, "sample": 1}, {"patient": 14, "sample": 2}, {"patient": 4}) == ([1, 0, 2, 1], "patients")
    assert of({"patient": 4, "sample": 0}, {"sample": 0}) == ([0, 0], "ECGs")
    assert of({"ecg_id": [7, 9]}, {"ecg_id": 7}, {"ecg_id": "9"}, {"ecg_id": 9}) == ([0, 0, 1, 1], "ECGs")
    assert of({"ecg_id": 7, "source": "ptbxl"}, {"ecg_id": 7, "source": "mimic"}) == ([1, 0], "ECGs")
    assert of({"patient": 7, "source": "ptbxl"}, {"patient": 7, "source": "mimic"}, {"patient": 7, "source": "ptbxl"}) == ([1, 0, 1], "patients")
    assert of({"ecg_id": []}, {"ecg_id": 7}) == ([0, 1], "rows")
    assert of() == ([], "rows")


SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3)
JSON = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=2), SCALARS, max_size=2)
COLUMNS = st.sampled_from(["prediction", "reference", "id", "task", "question_type", "template_id", "controls", "patient", "sample", "site", "ecg_id"])


@given(st.lists(st.dictionaries(COLUMNS, JSON | st.sampled_from(["ecgqa", "report", "yes"])), max_size=4))
@settings(max_examples=200, deadline=None)
def test_any_json_is_read_or_refused_in_one_line(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    try:
        found = read_predictions(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert len(found) == len(rows) == len({one["id"] for one in found})
    for one in found:
        assert one["task"] in ("ecgqa", "report") and all(isinstance(one[name], str) for name in ("prediction", "reference", "question_type", "id"))
    places, _ = units(found)
    assert places.dtype == np.int64 and len(places) == len(found)

"""Splits by patient: stable, in the right proportions, of no order, and never a patient in two."""

import json
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.manifest import SPLITS, pseudonym
from sharding.splits import assign
from toolkit.errors import UserError


def row(record, patient, split=""):
    return {"key": f"x_{record}", "record_id": str(record), "patient": pseudonym("x", patient), "split": split}


def splits(rows):
    return {r["key"]: r["split"] for r in rows}


people = st.lists(st.tuples(st.integers(0, 40), st.sampled_from(SPLITS)), min_size=1, max_size=60)


@settings(deadline=None)
@given(people, people, st.text(max_size=5), st.randoms())
def test_hash_moves_nobody_when_data_are_added(first, more, salt, random):
    old = [row(i, p) for i, (p, _) in enumerate(first)]
    new = deepcopy(old) + [row(1000 + i, p) for i, (p, _) in enumerate(more)]
    random.shuffle(new)
    assert assign(old, "hash", None, salt=salt) == assign(new, "hash", None, salt=salt) == {"how": "hash", "salt": salt}
    assert splits(old).items() <= splits(new).items()
    assert all(len({r["split"] for r in new if r["patient"] == patient}) == 1 for patient in {r["patient"] for r in new})


def test_hash_is_7_1_2_and_the_salt_decides():
    rows = [row(i, i) for i in range(20_000)]
    assign(rows, "hash", None)
    first = splits(rows)
    share = {split: list(first.values()).count(split) / len(rows) for split in SPLITS}
    # Five standard deviations of a binomial share: sqrt(0.7 * 0.3 / 20000) = 0.0032.
    assert share == {"train": pytest.approx(0.7, abs=0.016), "valid": pytest.approx(0.1, abs=0.011), "test": pytest.approx(0.2, abs=0.014)}
    assign(rows, "hash", None, salt="other")
    # Two independent draws agree with odds 0.49 + 0.01 + 0.04.
    assert sum(first[key] == split for key, split in splits(rows).items()) / len(rows) == pytest.approx(0.54, abs=0.02)


def test_hash_never_changes():
    """Manifests made today and in a year must agree, so the value is part of the format."""
    rows = [row(i, i) for i in range(12)]
    assign(rows, "hash", None)
    expected = ["train"] * 12
    expected[0] = expected[10] = "valid"
    expected[3] = "test"
    assert [r["split"] for r in rows] == expected


def test_own_split_is_left_alone_and_must_be_whole():
    rows = [row(1, "a", "train"), row(2, "a", "train"), row(3, "b", "test")]
    before = splits(rows)
    assert assign(rows, "strat_fold", "strat_fold") == {"how": "strat_fold"} and splits(rows) == before
    for split, message in (("", "1 of 4 ECGs are in no split .*x_4 has none.*--split hash"), ("train and valid", "x_4 has split 'train and valid'")):
        with pytest.raises(UserError, match=message):
            assign([*rows, row(4, "c", split)], "strat_fold", "strat_fold")


@pytest.mark.parametrize(("how", "own"), [("strat_fold", None), ("column", "strat_fold"), ("None", None)])
def test_a_split_that_the_dataset_has_not_is_refused(how, own):
    with pytest.raises(UserError, match=f"--split {how}.*--split hash"):
        assign([row(1, "a", "train")], how, own)


@settings(deadline=None)
@given(people, st.randoms())
def test_a_patient_in_two_splits_is_refused_whatever_the_order(given_people, random):
    rows = [row(i, p, split) for i, (p, split) in enumerate(given_people)]
    torn = sorted(pseudonym("x", p) for p in {p for p, _ in given_people} if len({s for q, s in given_people if q == p}) > 1)
    for _ in range(2):
        if torn:
            with pytest.raises(UserError) as caught:
                assign(rows, "column", "column")
            assert f"{len(torn)} patients have ECGs in two splits (pseudonyms {', '.join(torn[:3])}): add --split hash" in str(caught.value)
        else:
            assign(rows, "column", "column")
        random.shuffle(rows)


def tables(folder, **ids):
    folder.mkdir(parents=True, exist_ok=True)
    for split, records in ids.items():
        (folder / f"{split}_ecgs.tsv").write_text("".join(f"{i}\t{record}\n" for i, record in enumerate(records)))
    return folder


def test_ecgqa_split_takes_all_of_a_patient_along(tmp_path):
    folder = tables(tmp_path / "ecgqa" / "ptbxl", train=[1, 2, 99], valid=[3, 4], test=[5])
    (folder / "template").mkdir()
    rows = [
        row(1, "a"), row(10, "a"), row(11, "a"),  # train, with two ECGs that ECG-QA does not use
        row(2, "b"), row(3, "b"),  # train and valid: valid
        row(4, "c"), row(5, "c"), row(12, "c", "train"),  # valid and test: test, whatever the row said
        *(row(100 + i, f"u{i}") for i in range(50)),
    ]  # fmt: skip
    alone = deepcopy(rows[8:])
    assign(alone, "hash", None, salt="s")
    for where in (folder, folder / "template"):
        counts = assign(rows, "ecgqa", "strat_fold", ecgqa=where, salt="s")
        assert [r["split"] for r in rows[:8]] == ["train"] * 3 + ["valid"] * 2 + ["test"] * 3
        assert splits(rows[8:]) == splits(alone)
        assert counts == {
            "how": "ecgqa",
            "salt": "s",
            "official_ecgs": {"train": 2, "valid": 2, "test": 1},
            "patients": {"official": 3, "hashed": 50, "of two official splits": 2},
        }
        rows.reverse()
        reverse = splits(rows)
        assign(rows, "ecgqa", None, ecgqa=where, salt="s")
        assert splits(rows) == reverse
        rows.reverse()


def test_ecgqa_split_of_the_rows_where_there_are_no_tables(tmp_path):
    kind = {"template_id": 1, "question_type": "single-verify", "attribute_type": "noise", "question": "?", "answer": ["no"]}
    for split, ids in (("train", [[1], [2, 3]]), ("valid", [[4]]), ("test", [[5, 6]])):
        (tmp_path / "template" / split).mkdir(parents=True)
        (tmp_path / "template" / split / "00000.json").write_text(json.dumps([{**kind, "ecg_id": pair} for pair in ids]))
    rows = [row(i, f"p{i}") for i in range(1, 7)]
    assign(rows, "ecgqa", None, ecgqa=tmp_path)
    assert [r["split"] for r in rows] == ["train"] * 3 + ["valid"] + ["test"] * 2

    (tmp_path / "template" / "valid" / "00000.json").unlink()
    with pytest.raises(UserError, match="--ecgqa .* has no valid_ecgs.tsv and no rows below valid/"):
        assign(rows, "ecgqa", None, ecgqa=tmp_path)
    (tmp_path / "template" / "valid" / "00000.json").write_text(json.dumps([kind]))
    with pytest.raises(UserError, match="--ecgqa: .*00000.json: row 0 has no 'ecg_id'"):
        assign(rows, "ecgqa", None, ecgqa=tmp_path)


def test_wrong_ecgqa_folders_are_named(tmp_path):
    rows = [row(1, "a")]
    with pytest.raises(UserError, match="also name the folder"):
        assign(rows, "ecgqa", None)
    with pytest.raises(UserError, match="no train_ecgs.tsv"):
        assign(rows, "ecgqa", None, ecgqa=tmp_path)
    tables(tmp_path, train=[7], valid=[8], test=[9])
    with pytest.raises(UserError, match="none of its 3 ECGs is in this dataset"):
        assign(rows, "ecgqa", None, ecgqa=tmp_path)
    (tmp_path / "train_ecgs.tsv").write_text("0\t1\t2\n")
    with pytest.raises(UserError, match="train_ecgs.tsv is no table"):
        assign(rows, "ecgqa", None, ecgqa=tmp_path)


def test_the_official_tables_of_ecgqa(ecg_data):
    from sharding.splits import official

    if not (ecg_data / "ecgqa" / "ptbxl" / "train_ecgs.tsv").is_file():
        pytest.skip(f"no ecgqa/ptbxl/train_ecgs.tsv in {ecg_data}")
    ids = official(ecg_data / "ecgqa" / "ptbxl" / "template")
    assert {split: len(found) for split, found in ids.items()} == {"train": 11566, "valid": 1274, "test": 3214}  # as published
    assert not ids["train"] & ids["test"] and not ids["train"] & ids["valid"] and not ids["valid"] & ids["test"]

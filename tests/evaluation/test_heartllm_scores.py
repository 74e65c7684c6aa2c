"""The arithmetic of the authors' release, against values worked out by hand from its description."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import UserError
from toolkit.evaluation.heartllm import heartllm_compat
from toolkit.evaluation.metrics import report_scores
from toolkit.evaluation.text import WORDNET


def question(prediction, reference, kind="single-query"):
    return {"id": "q", "task": "ecgqa", "question_type": kind, "prediction": prediction, "reference": reference}


def report(prediction, reference):
    return {"id": "r", "task": "report", "prediction": prediction, "reference": reference}


@pytest.mark.parametrize(
    "prediction, reference, right",
    [
        ("yes", "yes", True),
        (" yes\n", "yes", True),  # its ends are stripped
        ("Yes", "yes", False),  # case-sensitive
        ("yes.", "yes", False),  # the empty part behind the full stop
        ("lead II.lead V1", "lead II; lead V1", True),
        ("lead V1.lead II", "lead II; lead V1", True),
        ("lead V1. lead II", "lead II; lead V1", False),  # the parts are not stripped
        ("lead V1.lead V1", "lead V1", True),  # a set
        ("lead V1", "lead II; lead V1", False),
        ("", "none", False),
        ("lead II; lead V1", "lead II; lead V1", False),  # one answer to them
    ],
)
def test_exact_match_of_one_question(prediction, reference, right):
    found = heartllm_compat([question(prediction, reference)])["questions"]["single-query"]
    assert (found["n"], found["correct"], found["exact_match"]) == (1, right, right)


def test_our_separator_is_told_apart():
    rows = [question("lead II; lead V1", "lead II; lead V1"), question("lead II.lead V1", "lead II; lead V1"), question("a; b", "a; c")]
    found = heartllm_compat(rows)["questions"]["single-query"]
    assert found == {"n": 3, "correct": 1, "exact_match": pytest.approx(1 / 3), "exact_match_own_separator": pytest.approx(2 / 3)}


def test_a_list_of_answers_is_split_already():
    rows = [{**question("b; a", "a; b"), "predicted": ["b", "a"]}, {**question("; yes", "yes"), "predicted": ["", "yes"]}, question("b; a", "a; b")]
    found = heartllm_compat(rows)["questions"]["single-query"]
    assert (found["correct"], found["exact_match_own_separator"]) == (1, pytest.approx(2 / 3))


def test_every_question_type_is_counted_under_its_name():
    kinds = ["single-verify", "comparison_consecutive-query", "open"]
    found = heartllm_compat([question("yes", answer, kind) for kind in kinds for answer in ("yes", "no")])
    assert {kind: (judged["n"], judged["exact_match"]) for kind, judged in found["questions"].items()} == {kind: (2, 0.5) for kind in kinds}
    assert found["reports"] is None and found["notes"] == []


def test_reports_by_hand():
    """ "Sinus rhythm." for "Sinus rhythm. Normal ecg.": 2 of 2 words, 1 of 1 pairs, smoothed 0.1 / 1 for longer ones, brevity exp(1 - 4/2)."""
    found, brevity = heartllm_compat([report("Sinus rhythm.", "Sinus rhythm. Normal ecg.")])["reports"], math.exp(-1)
    assert [found[f"bleu_{n}"] for n in range(1, 5)] == pytest.approx([brevity, brevity, brevity * 0.1**0.33, brevity * 0.01**0.25], rel=1e-12)
    # rouge: p 1, r 1/2; pairs 1 of 1 and of 3; the sentence found whole
    assert [found[f"rouge_{n}"] for n in "12l"] == pytest.approx([2 / 3, 1 / 2, 2 / 3], abs=1e-7)
    assert found["n"] == 1


def test_rouge_takes_sets_and_sentences():
    """Repeated words count once; for rouge-l the order of sentences is nothing, for rouge-2 it is: pairs 2 of 3."""
    repeated = heartllm_compat([report("st st st st", "st axis left normal")])["reports"]
    assert repeated["rouge_1"] == pytest.approx(2 * 1 / 4 / (5 / 4), abs=1e-7) and repeated["bleu_1"] == pytest.approx(1 / 4)
    turned = heartllm_compat([report("normal ecg. sinus rhythm.", "sinus rhythm. normal ecg.")])["reports"]
    assert [turned[f"rouge_{n}"] for n in "12l"] == pytest.approx([1, 2 / 3, 1], abs=1e-7)


def test_a_perfect_report_with_other_full_stops_is_far_from_perfect():
    found = heartllm_compat([report("sinus rhythm . normal ecg .", "sinus rhythm. normal ecg.")])["reports"]
    assert found["bleu_1"] == pytest.approx(2 / 6)
    assert found["rouge_l"] == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("nothing", ["", " ", ".", "...", " . "])
def test_what_says_nothing_scores_zero_and_stays(nothing):
    found = heartllm_compat([report(nothing, "sinus rhythm"), report("sinus rhythm", "sinus rhythm")])["reports"]
    assert found["n"] == 2 and found["bleu_1"] == 0.5
    assert [found[f"rouge_{n}"] for n in "12l"] == pytest.approx([0.5] * 3, abs=1e-7)


def test_a_report_that_never_ends_is_scored():
    long = " ".join(f"w{i}" for i in range(700))
    found = heartllm_compat([report(f"{long} x", f"{long} y")])["reports"]
    assert found["rouge_l"] == pytest.approx(700 / 701, abs=1e-7)


def test_meteor_needs_wordnet():
    found = heartllm_compat([report("sinus rhythm", "sinus rhythm")])
    assert (found["reports"]["meteor"] is None) is not WORDNET
    assert any("WordNet" in note for note in found["notes"]) is not WORDNET


words = st.lists(st.sampled_from(["sinus", "rhythm.", "normal", "ecg.", "Left"]), max_size=6).map(" ".join)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.builds(report, words, words.filter(bool)), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_bleu_is_that_of_the_table_and_the_order_is_nothing(rows, random):
    found = heartllm_compat(rows)["reports"]
    table = {score.name: score.all() for score in report_scores(rows, [row["prediction"] for row in rows])}
    for n in range(1, 5):
        assert found[f"bleu_{n}"] == pytest.approx(table[f"bleu_{n}_heartllm"], rel=1e-12)
    assert heartllm_compat(random.sample(rows, len(rows)))["reports"] == found
    assert all(value is None or 0 <= value <= 1 for name, value in found.items() if name != "n")


def test_what_cannot_be_judged_is_named():
    with pytest.raises(UserError, match="empty"):
        heartllm_compat([])
    with pytest.raises(UserError, match="'q'.*'reference'"):
        heartllm_compat([{"id": "q", "task": "ecgqa", "question_type": "single-verify", "prediction": "yes"}])
    with pytest.raises(UserError, match="'reports'"):
        heartllm_compat([{**report("a", "a"), "task": "reports"}])

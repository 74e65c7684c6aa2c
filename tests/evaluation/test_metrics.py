"""Metrics against independent, slow, obvious computations, and the blind baseline against brute force."""

import json
import math
from collections import Counter

import nltk.translate.bleu_score as nltk_bleu
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.evaluation import blind
from toolkit.evaluation.metrics import exact_match, over_blind, question_counts, report_scores
from toolkit.evaluation.statistics import patient_bootstrap
from toolkit.tasks.answers import join_answers

SINGLE = ["single-verify", "single-choose", "single-query"]
WORDS = ["sinus", "rhythm", "normal", "ecg", "left", "axis", "st"]  # few, so that n-grams do recur


def question(prediction, reference, kind="single-query"):
    return {"id": "q", "task": "ecgqa", "question_type": kind, "prediction": prediction, "reference": reference}


def report(prediction, reference):
    return {"id": "r", "task": "report", "question_type": "report", "prediction": prediction, "reference": reference}


def slow_ngrams(words, order):
    return [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]


def slow_bleu(rows, max_order):
    """Corpus BLEU straight from Papineni et al. (2002), without smoothing; None where smoothing would begin."""
    logs = []
    for order in range(1, max_order + 1):
        matched = total = 0
        for row in rows:
            wanted = Counter(slow_ngrams(row["reference"].split(), order))
            for gram in slow_ngrams(row["prediction"].split(), order):
                total += 1
                if wanted[gram] > 0:
                    matched += 1
                    wanted[gram] -= 1
        if matched == 0:
            return None
        logs.append(math.log(matched / total))
    said = sum(len(row["prediction"].split()) for row in rows)
    wanted = sum(len(row["reference"].split()) for row in rows)
    return min(1.0, math.exp(1 - wanted / said)) * math.exp(sum(logs) / max_order)


def slow_rouge_l(row):
    a, b = row["prediction"].split(), row["reference"].split()

    def longest(i, j):
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    common = longest(0, 0)
    return 2 * common / (len(a) + len(b)) if common else 0.0


sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map(" ".join)
report_rows = st.lists(st.builds(report, st.one_of(st.just(""), sentences), sentences), min_size=1, max_size=6)
answers = st.lists(st.sampled_from(["yes", "no", "avb", "lead V1", "Lead I, aVL"]), unique=True, max_size=3)
kinds = st.sampled_from([*SINGLE, "comparison_consecutive-query"])
question_rows = st.lists(
    st.builds(question, answers.map("; ".join), answers.filter(len).map("; ".join), kinds), max_size=12
)


# exact match


@pytest.mark.parametrize(
    "prediction, reference, right",
    [
        ("yes", "yes", True),
        ("Yes ", "yes", True),
        ("lead V2; lead I", "lead I; lead V2", True),
        ("a; a", "a", True),
        ("a;", "a", True),
        ("a", "a; b", False),
        ("a; b", "a", False),
        ("", "none", False),
        (" ; ", "none", False),
        ("a, b", "a; b", False),
        ("yes, it is", "yes", False),
    ],
)
def test_exact_match_of_one_question(prediction, reference, right):
    assert exact_match([question(prediction, reference)])["overall"] == float(right)


@given(question_rows)
def test_exact_match_is_a_plain_count(rows):
    scores, counts = exact_match(rows), question_counts(rows)
    asked, right = Counter(), Counter()
    for row in rows:
        for key in ("overall", row["question_type"]):
            asked[key] += 1
            if sorted(row["prediction"].split("; ")) == sorted(row["reference"].split("; ")):
                right[key] += 1
    assert scores == {key: right[key] / asked[key] if asked[key] else None for key in {"overall", *SINGLE, *asked}}
    assert counts == {key: asked[key] for key in scores if key != "overall"}
    assert list(scores)[:4] == ["overall", *SINGLE] and list(counts)[:3] == SINGLE


def test_reports_are_no_questions_and_questions_no_reports():
    rows = [report("a b", "a c"), question("yes", "yes", "single-verify")]
    assert exact_match(rows) == {"overall": 1, "single-verify": 1, "single-choose": None, "single-query": None}
    assert report_scores(rows) == report_scores(rows[:1])
    assert exact_match(rows[:1]) == dict.fromkeys(["overall", *SINGLE])
    assert report_scores(rows[1:]) == dict.fromkeys(["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"]) | {"n": 0}


def test_an_unknown_task_is_named_and_not_dropped():
    row = {**report("a", "a"), "task": "reports", "id": "ptbxl-7"}
    for score in (exact_match, report_scores, question_counts):
        with pytest.raises(ValueError, match="'ptbxl-7'.*'reports'"):
            score([row])


# over the blind baseline


@settings(max_examples=8, deadline=None)
@given(question_rows, st.lists(report_rows.map(lambda rows: rows[0]), max_size=3), st.randoms(use_true_random=False))
def test_over_blind_is_the_difference_of_both_scores_and_its_interval_of_each_kinds_rows(questions, reports, random):
    rows = [{**row, "blind": random.choice(["yes", row["reference"]])} for row in questions + reports]
    patients = [random.choice("abcd") for _ in rows]
    compared = over_blind(rows, patients)
    model, blind_too = exact_match(rows), exact_match([{**row, "prediction": row["blind"]} for row in rows])
    assert list(compared) == list(model)
    for kind, over in compared.items():
        mine = [(row, p) for row, p in zip(rows, patients) if row["task"] == "ecgqa" and kind in ("overall", row["question_type"])]
        assert (over["n"], over["patients"]) == (len(mine), len({p for _, p in mine}))
        if not mine:
            assert over["difference"] is over["low"] is over["high"] is None
            continue
        assert over["difference"] == pytest.approx(model[kind] - blind_too[kind])
        right, by_blind = ([exact_match([{**row, "prediction": row[by]}])["overall"] for row, _ in mine] for by in ("prediction", "blind"))
        assert (over["difference"], over["low"], over["high"]) == patient_bootstrap(right, by_blind, [p for _, p in mine])


def test_over_blind_refuses_patients_that_do_not_fit():
    with pytest.raises(ValueError):
        over_blind([{**question("yes", "yes"), "blind": "no"}] * 3, ["a", "b"])
    with pytest.raises(ValueError, match="'reports'"):
        over_blind([{**report("a", "a"), "blind": "a", "task": "reports"}], ["a"])


# reports


def test_bleu_by_hand():
    """ "a b c d x" for "a b c d e f": p = 4/5, 3/4, 2/3, 1/2; brevity exp(1 - 6/5)."""
    scores = report_scores([report("a b c d x", "a b c d e f")])
    brevity = math.exp(1 - 6 / 5)
    assert scores["bleu_1"] == pytest.approx(brevity * 4 / 5)
    assert scores["bleu_2"] == pytest.approx(brevity * (4 / 5 * 3 / 4) ** (1 / 2))
    assert scores["bleu_3"] == pytest.approx(brevity * (4 / 5 * 3 / 4 * 2 / 3) ** (1 / 3))
    assert scores["bleu_4"] == pytest.approx(brevity * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4))
    assert scores["rouge_l"] == pytest.approx(2 * 4 / 11) and scores["n"] == 1


def test_repeated_words_count_no_oftener_than_the_reference_has_them():
    assert report_scores([report("st st st st", "st axis left normal")])["bleu_1"] == pytest.approx(1 / 4)


def test_case_and_the_full_stop_are_tokens_by_convention():
    scores = report_scores([report("Sinus Rhythm. Normal ECG.", "sinus rhythm . normal ecg .")])
    assert scores == pytest.approx({f"bleu_{n}": 1 for n in range(1, 5)} | {"rouge_l": 1, "n": 1})


@given(report_rows)
def test_bleu_and_rouge_equal_the_slow_loops(rows):
    scores = report_scores(rows)
    for order in range(1, 5):
        expected = slow_bleu(rows, order)
        if expected is not None:
            assert scores[f"bleu_{order}"] == pytest.approx(expected)
    assert scores["rouge_l"] == pytest.approx(sum(map(slow_rouge_l, rows)) / len(rows))
    assert all(0 <= value <= 1 for name, value in scores.items() if name != "n") and scores["n"] == len(rows)


@given(report_rows)
def test_bleu_equals_nltk_where_both_are_defined(rows):
    if slow_bleu(rows, 4) is None:
        return
    references, predictions = [[row["reference"].split()] for row in rows], [row["prediction"].split() for row in rows]
    for order in range(1, 5):
        if min(map(len, predictions)) < order:
            continue  # nltk counts one n-gram for a text that is too short to have any
        expected = nltk_bleu.corpus_bleu(references, predictions, weights=[1 / order] * order)
        assert report_scores(rows)[f"bleu_{order}"] == pytest.approx(expected)


def test_an_empty_prediction_scores_zero_and_stays_in_the_mean():
    assert report_scores([report("", "a b c d")]) == {f"bleu_{n}": 0 for n in range(1, 5)} | {"rouge_l": 0, "n": 1}
    scores = report_scores([report("", "a b c d"), report("a b c d", "a b c d")])
    assert scores["rouge_l"] == 0.5 and scores["n"] == 2
    assert scores["bleu_1"] == pytest.approx(math.exp(1 - 8 / 4))


# both


@given(question_rows, report_rows, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(questions, reports, random):
    rows = questions + reports
    shuffled = random.sample(rows, len(rows))
    assert exact_match(shuffled) == exact_match(rows)
    assert report_scores(shuffled) == report_scores(rows)


@given(question_rows, report_rows)
def test_perfect_predictions_score_one(questions, reports):
    reports = [*reports, report("", "sinus rhythm normal ecg")]  # BLEU-4 is 0 where no report has four words
    perfect = [{**row, "prediction": row["reference"]} for row in questions + reports]
    assert set(exact_match(perfect).values()) <= {1.0, None}
    scores = report_scores(perfect)
    assert {scores[f"bleu_{n}"] for n in range(1, 5)} == {1.0} and scores["rouge_l"] == 1.0


# the blind baseline


def asked(template, attribute, answer, kind="single-choose"):
    return {
        "id": "t", "task": "ecgqa", "question_type": kind, "attribute_type": "scp_code", "template_id": template,
        "question": "?", "answer": answer, "attribute": attribute,
    }  # fmt: skip


tasks = st.lists(
    st.builds(
        asked,
        st.integers(1, 3),
        st.one_of(st.none(), st.lists(st.sampled_from("ab"), unique=True, max_size=2)),
        answers.filter(len),
        kinds,
    ),
    max_size=15,
)


def slow_blind(train, task):
    same = [
        lambda t: (
            t["template_id"] == task["template_id"] and sorted(t["attribute"] or []) == sorted(task["attribute"] or [])
        ),
        lambda t: t["template_id"] == task["template_id"],
        lambda t: t["question_type"] == task["question_type"],
        lambda t: True,
    ]
    for level in same:
        seen = [join_answers(t["answer"]) for t in train if level(t)]
        if seen:
            return sorted(set(seen), key=lambda answer: (-seen.count(answer), answer))[0]
    return ""


@settings(max_examples=60)
@given(tasks, tasks, st.randoms(use_true_random=False))
def test_blind_is_the_brute_force_majority(train, test, random):
    baseline = blind.fit(iter(train))
    assert baseline == blind.fit(random.sample(train, len(train)))
    restored = json.loads(json.dumps(baseline))
    for task in [*train, *test]:
        assert blind.predict(restored, task) == slow_blind(train, task)


def test_blind_falls_back_level_by_level():
    train = [
        asked(1, ["a"], ["yes"], "single-verify"),
        asked(1, ["b"], ["no"], "single-verify"),
        asked(1, ["c"], ["no"], "single-verify"),
        *[asked(2, ["a", "b"], ["b", "a"])] * 5,
    ]
    baseline = blind.fit(train)
    assert blind.predict(baseline, asked(1, ["a"], [], "single-verify")) == "yes"
    assert blind.predict(baseline, asked(1, ["new"], [], "single-verify")) == "no"
    assert blind.predict(baseline, asked(9, ["a"], [], "single-verify")) == "no"
    assert blind.predict(baseline, asked(9, ["a"], [], "single-query")) == "a; b"
    assert blind.predict(baseline, asked(2, ["b", "a"], [])) == "a; b"


def test_blind_reports_and_nothing_learned():
    reports = [{"id": "r", "task": "report", "report": text} for text in ("z", "a", "z", "a", "b")]
    assert blind.predict(blind.fit(reports), {"id": "x", "task": "report", "report": "?"}) == "a"
    nothing = blind.fit([])
    assert blind.predict(nothing, reports[0]) == "" and blind.predict(nothing, asked(1, None, ["yes"])) == ""
    with pytest.raises(ValueError, match="'t9'.*'pretrain'"):
        blind.fit([{"id": "t9", "task": "pretrain"}])

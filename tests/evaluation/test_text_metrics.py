"""Report scores against the libraries, slow obvious loops and values worked out by hand."""

import logging
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from sacrebleu.metrics import BLEU

from toolkit.evaluation import text
from toolkit.evaluation.text import text_scores, words_13a, words_coco

WORDS = ["sinus", "rhythm", "Rhythms", "normal.", "ecg", "left", "axis", "st.t", "."]  # few, so that n-grams do recur
BLEUS = [f"bleu_{n}_{convention}" for convention in ("heartllm", "corpus", "coco") for n in range(1, 5)]
NAMES = [*BLEUS, "meteor", "rouge_1", "rouge_2", "rouge_l"]

sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map(" ".join)
pairs = st.lists(st.tuples(sentences, st.one_of(st.just(""), sentences)), min_size=1, max_size=6)


def scored(pairs):
    return {score.name: score.all() for score in scores_of(pairs)}


def scores_of(pairs):
    return text_scores(range(len(pairs)), *zip(*pairs))


# by hand


def test_bleu_of_three_conventions_by_hand():
    """ "a b c d x" for "a b c d e f": p = 4/5, 3/4, 2/3, 1/2; brevity exp(1 - 6/5). All conventions agree where nothing is smoothed, but for .33."""
    scores, brevity = scored([("a b c d e f", "a b c d x")]), math.exp(1 - 6 / 5)
    expected = {1: 4 / 5, 2: (4 / 5 * 3 / 4) ** (1 / 2), 3: (4 / 5 * 3 / 4 * 2 / 3) ** (1 / 3), 4: (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)}
    for n, value in expected.items():
        assert scores[f"bleu_{n}_corpus"] == pytest.approx(brevity * value, rel=1e-12)
        assert scores[f"bleu_{n}_coco"] == pytest.approx(brevity * value, rel=1e-8)
        assert scores[f"bleu_{n}_heartllm"] == pytest.approx(brevity * (value if n != 3 else value**0.99), rel=1e-12)
    assert scores["rouge_1"] == pytest.approx(2 * 4 / 11) and scores["rouge_l"] == pytest.approx(2 * 4 / 11)
    assert scores["rouge_2"] == pytest.approx(2 * 3 / 9)


def test_a_corpus_score_is_no_mean_over_reports():
    """Two reports, one right and of two words, one wrong and of eight: 0.5 of the reports, 2 of 10 words."""
    scores = scored([("sinus rhythm", "sinus rhythm"), ("a b c d e f g h", "i j k l m n o p")])
    assert scores["bleu_1_heartllm"] == pytest.approx(0.5)
    assert scores["bleu_1_corpus"] == pytest.approx(0.2) and scores["bleu_1_coco"] == pytest.approx(0.2)


def test_case_and_the_full_stop():
    """By corpus and coco nothing is wrong; by heartllm 1 word of 4 is right and no pair of 3, which is smoothed to 0.1; brevity exp(1 - 6/4)."""
    scores = scored([("sinus rhythm . normal ecg .", "Sinus Rhythm. normal ECG.")])
    for n in range(1, 5):
        assert scores[f"bleu_{n}_corpus"] == pytest.approx(1) and scores[f"bleu_{n}_coco"] == pytest.approx(1)
    assert scores["bleu_1_heartllm"] == pytest.approx(math.exp(-0.5) * 1 / 4)
    assert scores["bleu_2_heartllm"] == pytest.approx(math.exp(-0.5) * math.sqrt(1 / 4 * 0.1 / 3))
    assert words_coco("Sinus rhythm.Normal ECG.") == ["sinus", "rhythm", ".", "normal", "ecg", "."]
    assert words_13a("Q in I, aVL (old).") == ["q", "in", "i", ",", "avl", "(", "old", ")", "."]


def test_repeated_words_count_no_oftener_than_the_reference_has_them():
    scores = scored([("st axis left normal", "st st st st")])
    assert all(scores[f"bleu_1_{convention}"] == pytest.approx(1 / 4) for convention in ("heartllm", "corpus", "coco"))


def test_sacrebleu_smooths_by_halves():
    """No 2-gram of 3 and no 3-gram of 2 is right: they count 1/2 and 1/4 of a match."""
    assert scored([("a b c d", "a c b x")])["bleu_3_corpus"] == pytest.approx((3 / 4 * 0.5 / 3 * 0.25 / 2) ** (1 / 3), rel=1e-12)


def test_pycocoevalcap_smooths_hardly_at_all():
    assert scored([("a b c d", "a c b x")])["bleu_2_coco"] == pytest.approx((3 / 4 * 1e-15 / 3) ** (1 / 2), rel=1e-8)
    assert scored([("a b", "a b")])["bleu_4_coco"] == pytest.approx(1e-3, rel=1e-8)  # no 3-gram and no 4-gram: 1e-15 / 1e-9 each


@pytest.mark.skipif(text.WORDNET, reason="WordNet is installed: synonyms match too")
@pytest.mark.parametrize(
    "reference, prediction, matches, chunks, said, wanted",
    [
        ("sinus rhythm normal ecg", "sinus rhythm normal ecg", 4, 1, 4, 4),
        ("Sinus rhythms normal ecg", "sinus rhythm normal", 3, 1, 3, 4),  # lower case and the stem
        ("a b c d", "c d a b", 4, 2, 4, 4),
        ("heart", "cardiac", 0, 0, 1, 1),  # a synonym is no match without WordNet
        ("a b", "", 0, 0, 0, 2),
    ],
)
def test_meteor_by_hand(reference, prediction, matches, chunks, said, wanted):
    """Lavie and Agarwal (2007): F = PR / (0.9 P + 0.1 R), times 1 - 0.5 (chunks / matches)^3."""
    p, r = matches / max(said, 1), matches / wanted
    expected = p * r / (0.9 * p + 0.1 * r) * (1 - 0.5 * (chunks / matches) ** 3) if matches else 0
    assert scored([(reference, prediction)])["meteor"] == pytest.approx(expected, rel=1e-12)


def test_the_conventions_say_what_meteor_did_here():
    assert ("WordNet is not installed" in text.CONVENTIONS["meteor"]) is not text.WORDNET == text.wordnet_is_installed()
    families = {name.split("_")[0] + ("_" + name.split("_")[2] if name in BLEUS else "") for name in NAMES}
    assert families | {"report"} == set(text.CONVENTIONS)


# against libraries and slow loops


@settings(deadline=None)
@given(pairs)
def test_corpus_bleu_is_sacrebleus(pairs):
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)
    scores = scored(pairs)
    for n in range(1, 5):
        expected = BLEU(lowercase=True, max_ngram_order=n, force=True).corpus_score([said for _, said in pairs], [[wanted for wanted, _ in pairs]])
        assert scores[f"bleu_{n}_corpus"] == pytest.approx(expected.score / 100, rel=1e-12, abs=1e-15)


@settings(deadline=None)
@given(pairs)
def test_heartllm_bleu_is_the_mean_of_nltks_sentence_bleu(pairs):
    scores = scored(pairs)
    for n, weights in enumerate([(1,), (0.5, 0.5), (0.33, 0.33, 0.33), (0.25, 0.25, 0.25, 0.25)], 1):
        each = [sentence_bleu([wanted.split()], said.split(), weights, SmoothingFunction().method1) for wanted, said in pairs]
        assert scores[f"bleu_{n}_heartllm"] == pytest.approx(sum(each) / len(each), rel=1e-12)


def slow_coco(pairs, order):
    """As its documentation and source say: every n-gram of the corpus counted by hand."""
    bleu, said_words, wanted_words = 1.0, 0, 0
    for n in range(1, order + 1):
        matched = guessed = said_words = wanted_words = 0
        for wanted, said in pairs:
            wanted, said = (" ".join(t.lower().replace(".", " . ").split()).split(" ") if t.strip() else [] for t in (wanted, said))
            left = Counter(tuple(wanted[i : i + n]) for i in range(len(wanted) - n + 1))
            for i in range(len(said) - n + 1):
                guessed += 1
                if left[tuple(said[i : i + n])] > 0:
                    left[tuple(said[i : i + n])] -= 1
                    matched += 1
            said_words, wanted_words = said_words + len(said), wanted_words + len(wanted)
        bleu *= (matched + 1e-15) / (guessed + 1e-9)
    ratio = (said_words + 1e-15) / (wanted_words + 1e-9)
    return bleu ** (1 / order) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1)


@given(pairs)
def test_coco_bleu_is_a_slow_loops(pairs):
    scores = scored(pairs)
    for n in range(1, 5):
        assert scores[f"bleu_{n}_coco"] == pytest.approx(slow_coco(pairs, n), rel=1e-9, abs=1e-15)


def slow_rouge(wanted, said, n):
    """F1 of n-grams, or of the longest common subsequence where n is None; words are runs of a-z and 0-9."""
    wanted, said = ("".join(c if c.isalnum() else " " for c in t.lower()).split() for t in (wanted, said))
    if n is None:

        def longest(i, j):
            if i == len(wanted) or j == len(said):
                return 0
            return 1 + longest(i + 1, j + 1) if wanted[i] == said[j] else max(longest(i + 1, j), longest(i, j + 1))

        common, sizes = longest(0, 0), (len(wanted), len(said))
    else:
        a, b = ([tuple(t[i : i + n]) for i in range(len(t) - n + 1)] for t in (wanted, said))
        common, sizes = (Counter(a) & Counter(b)).total(), (len(a), len(b))
    return 2 * common / sum(sizes) if common else 0.0


@settings(deadline=None)
@given(pairs)
def test_rouge_is_a_slow_loops(pairs):
    scores = scored(pairs)
    for name, n in (("rouge_1", 1), ("rouge_2", 2), ("rouge_l", None)):
        assert scores[name] == pytest.approx(sum(slow_rouge(*pair, n) for pair in pairs) / len(pairs), rel=1e-12)


# properties


@settings(deadline=None)
@given(pairs, st.randoms(use_true_random=False))
def test_bounds_and_the_order_of_reports(pairs, random):
    scores = scored(pairs)
    assert list(scores) == NAMES and all(0 <= value <= 1 for value in scores.values())
    assert scored(random.sample(pairs, len(pairs))) == pytest.approx(scores, rel=1e-12)


@settings(deadline=None)
@given(st.lists(sentences, min_size=1, max_size=6))
def test_perfect_reports_score_one_where_the_convention_allows(references):
    scores = scored([(t, t) for t in [*references, "sinus rhythm normal ecg with left axis"]])  # a 2-gram and a 4-gram are there
    for name in ("bleu_1_heartllm", "rouge_1", *[f"bleu_{n}_corpus" for n in range(1, 5)], *[f"bleu_{n}_coco" for n in range(1, 5)]):
        if name != "rouge_1" or all(any(c.isalnum() for c in t) for t in references):
            assert scores[name] == pytest.approx(1, abs=1e-7)


def test_empty_predictions_score_zero_and_stay():
    assert set(scored([("a b c d", ""), ("a", " \n")]).values()) == {0.0}
    scores = scored([("a b c d", ""), ("a b c d", "a b c d")])
    assert scores["bleu_1_heartllm"] == scores["rouge_l"] == 0.5
    assert scores["bleu_1_corpus"] == pytest.approx(math.exp(1 - 8 / 4)) and scores["bleu_1_coco"] == pytest.approx(math.exp(1 - 8 / 4))


@settings(deadline=None)
@given(pairs.filter(lambda pairs: len(pairs) > 2))
def test_a_score_is_what_its_rows_add_up_to(pairs):
    """A part of the rows scores as a file of these alone; whole numbers weigh as repeated rows; no row is no score."""
    part, twice = pairs[:2], [*pairs, pairs[0]]
    for whole, alone, again in zip(scores_of(pairs), scores_of(part), scores_of(twice)):
        assert whole.rows.tolist() == list(range(len(pairs)))
        assert whole.on(np.array([0, 1])).all() == pytest.approx(alone.all(), rel=1e-12, abs=1e-15)
        weights = np.array([[2, *[1] * (len(pairs) - 1)], [1, 1, *[0] * (len(pairs) - 2)], [0] * len(pairs)])
        drawn = whole.value(weights @ whole.stats)
        assert drawn[:2] == pytest.approx([again.all(), alone.all()], rel=1e-12, abs=1e-15) and np.isnan(drawn[2])


def test_the_rows_are_those_given():
    scores = text_scores([3, 8], ["a", "b"], ["a", "c"])
    assert all(score.rows.tolist() == [3, 8] and score.stats.shape[0] == 2 for score in scores)
    with pytest.raises(ValueError):
        text_scores([0, 1], ["a", "b"], ["a"])


def test_rouge_knows_no_letters_but_a_to_z_and_says_so():
    assert text.rouge("心房颤动", "心房颤动") == (0, 0, 0) and text.rouge("ischämie", "isch mie") == (1, 1, 1)
    assert "any other letter parts a word" in text.CONVENTIONS["rouge"] and "another script scores 0" in text.CONVENTIONS["rouge"]

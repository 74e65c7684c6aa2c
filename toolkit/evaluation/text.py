"""Scores of reports as text: BLEU in three conventions, METEOR, ROUGE.

At least four definitions of BLEU are in use for ECG reports, and they are far apart: on PTB-XL one constant report alone has BLEU-4 18.2 by one of them
and 3.2 by another (PAPER.md, section 2, item 22). So each name says its convention, and `CONVENTIONS` belongs beside the numbers.
A corpus BLEU is no mean over reports; its `Score` adds up n-gram counts and lengths, as the original does (Papineni et al., 2002).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import SimpleNamespace

import nltk
import numpy as np
import sacrebleu
from nltk.corpus import wordnet
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from toolkit.evaluation.scores import Score, mean_score

ORDERS = (1, 2, 3, 4)
HEARTLLM_WEIGHTS = ((1, 0, 0, 0), (0.5, 0.5, 0, 0), (0.33, 0.33, 0.33, 0), (0.25, 0.25, 0.25, 0.25))  # of BLEU-1..4, as the release has them


def wordnet_is_installed() -> bool:
    """Whether nltk finds WordNet's files on this machine; nothing is downloaded."""
    try:
        wordnet.ensure_loaded()
    except LookupError:
        return False
    return True


WORDNET = wordnet_is_installed()
METEOR_STAGES = "exact, stem and WordNet synonyms" if WORDNET else "exact and stem; WordNet is not installed here, so no synonyms"

CONVENTIONS = {
    "bleu_heartllm": (
        f"mean over reports of nltk {nltk.__version__} sentence BLEU with smoothing method1 on whitespace tokens, case-sensitive; BLEU-3 has the weights "
        "(.33, .33, .33) of the HeartLLM release. A report of fewer than n words is smoothed: even a perfect one has no BLEU-n of 1"
    ),
    "bleu_corpus": f"sacrebleu corpus BLEU of order n, nrefs:1|case:lc|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}",
    "bleu_coco": (
        'corpus BLEU as pycocoevalcap computes it (no smoothing but 1e-15 and 1e-9 against division by zero), lower case, whitespace tokens with "." '
        "as a token of its own"
    ),
    "meteor": f"nltk {nltk.__version__} METEOR ({METEOR_STAGES}) on whitespace tokens in lower case, mean over reports; below 1 even for a perfect report",
    "rouge": (
        "rouge-score F1 of ROUGE-1, -2 and -L without stemming, mean over reports; its words are of a to z and digits: any other letter parts a word as a "
        "space does, and a report in another script scores 0"
    ),
    "report": "every report counts, an empty prediction with 0",
}


def text_scores(rows: Sequence[int], references: Sequence[str], predictions: Sequence[str]) -> list[Score]:
    """All scores of reports: bleu_1..4 by heartllm, corpus and coco, meteor, rouge_1, rouge_2, rouge_l, in this order.

    rows: [m] their places in the file of predictions, for `Score.rows`; references, predictions: [m]. 20,000 pairs of 15 words, all different,
    take 8 s on one core; a pair that occurs again costs nothing.
    """
    rows = np.asarray(rows, np.int64)
    pairs = list(dict.fromkeys(zip(references, predictions, strict=True)))
    place = {pair: i for i, pair in enumerate(pairs)}
    which = np.array([place[pair] for pair in zip(references, predictions)], np.int64)

    whitespace = ngram_stats(pairs, str.split)
    sentences = sentence_bleu(whitespace)
    scores = [mean_score(f"bleu_{n}_heartllm", f"BLEU-{n} (heartllm)", rows, sentences[which, n - 1]) for n in ORDERS]
    for name, words, bleu in (("corpus", words_13a, corpus_bleu), ("coco", words_coco, coco_bleu)):
        stats = ngram_stats(pairs, words)[which]
        scores += [Score(f"bleu_{n}_{name}", f"BLEU-{n} ({name})", rows, stats, partial(bleu, order=n)) for n in ORDERS]
    each = np.array([meteor(*pair) for pair in pairs])
    scores.append(mean_score("meteor", "METEOR" if WORDNET else "METEOR (exact + stem)", rows, each[which]))
    each = np.array([rouge(*pair) for pair in pairs]).reshape(-1, 3)
    return scores + [mean_score(f"rouge_{n.lower()}", f"ROUGE-{n}", rows, each[which, i]) for i, n in enumerate("12L")]


def words_13a(text: str) -> list[str]:
    """The tokens of sacrebleu with tok:13a case:lc."""
    return _tokenizer_13a(text.lower().rstrip()).split()


_tokenizer_13a = Tokenizer13a()


def words_coco(text: str) -> list[str]:
    """Lower case, whitespace tokens, "." a token of its own: "Sinus rhythm.Normal ECG." has six."""
    return text.lower().replace(".", " . ").split()


def ngram_stats(pairs: Sequence[tuple[str, str]], words: Callable[[str], list[str]]) -> np.ndarray:
    """float64 [m, 11] of (reference, prediction): 1, words of the prediction, of the reference, n-grams matched (n = 1..4), n-grams of the prediction.

    Matched no oftener than the reference has them (Papineni et al., 2002). words: what splits a text; each text is split once.
    """
    split = {text: words(text) for text in {text for pair in pairs for text in pair}}
    stats = np.zeros((len(pairs), 11))
    for row, (reference, prediction) in zip(stats, pairs):
        wanted, said = split[reference], split[prediction]
        row[:3] = 1, len(said), len(wanted)
        for n in ORDERS:
            has = Counter(zip(*(wanted[i:] for i in range(n))))
            grams = Counter(zip(*(said[i:] for i in range(n))))
            row[2 + n] = sum(min(times, has[gram]) for gram, times in grams.items() if gram in has)
            row[6 + n] = max(len(said) - n + 1, 0)
    return stats


def corpus_bleu(sums: np.ndarray, order: int) -> np.ndarray:
    """BLEU [...] of `ngram_stats` summed, [..., 11], as sacrebleu has it with smooth:exp: the k-th order without a match counts 2**-k matches."""
    rows, said, wanted, matched, total = _named(sums, order)
    with np.errstate(divide="ignore", invalid="ignore"):
        smoothed = np.where(matched > 0, matched, 0.5 ** np.cumsum(matched == 0, -1))
        precision = np.where(total > 0, smoothed / total, 0)
        bleu = brevity(said, wanted) * np.exp(np.log(precision).mean(-1))
    bleu = np.where(matched[..., 0] > 0, np.minimum(bleu, 1), 0)  # rounding takes a perfect corpus to 1.0000000000000004
    return np.where(rows > 0, bleu, np.nan)


def coco_bleu(sums: np.ndarray, order: int) -> np.ndarray:
    """BLEU [...] of `ngram_stats` summed, [..., 11], as pycocoevalcap has it: tiny numbers keep an order without a match from being 0 exactly."""
    rows, said, wanted, matched, total = _named(sums, order)
    precision = (matched + 1e-15) / (total + 1e-9)
    ratio = (said + 1e-15) / (wanted + 1e-9)
    bleu = np.prod(precision, -1) ** (1 / order) * np.exp(np.minimum(0, 1 - 1 / ratio))
    return np.where(rows > 0, np.where(said > 0, bleu, 0), np.nan)


def sentence_bleu(stats: np.ndarray) -> np.ndarray:
    """BLEU-1..4 [m, 4] of each report from `ngram_stats` [m, 11], as nltk has it with smoothing method1 (0.1 for no match) and `HEARTLLM_WEIGHTS`."""
    _, said, wanted, matched, total = _named(stats, 4)
    precision = np.where(matched > 0, matched, 0.1) / np.maximum(total, 1)
    bleu = brevity(said, wanted)[:, None] * np.exp(np.log(precision) @ np.array(HEARTLLM_WEIGHTS).T)
    return np.where(matched[:, :1] > 0, bleu, 0)


def brevity(said: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The factor for predictions of `said` words in all where the references have `wanted`; 0 where nothing was said."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(said > 0, np.exp(np.minimum(0, 1 - wanted / said)), 0)


def _named(sums: np.ndarray, order: int) -> tuple[np.ndarray, ...]:
    return sums[..., 0], sums[..., 1], sums[..., 2], sums[..., 3 : 3 + order], sums[..., 7 : 7 + order]


def meteor(reference: str, prediction: str) -> float:
    """METEOR of one report as `CONVENTIONS["meteor"]` says (Lavie and Agarwal, 2007, in nltk's form with alpha 0.9, beta 3, gamma 0.5)."""
    return single_meteor_score(reference.split(), prediction.split(), stemmer=_STEMMER, wordnet=_SYNONYMS)


# the same words come again and again: 20,000 pairs take 0.5 s, without these caches 1.7 s
_STEMMER = SimpleNamespace(stem=lru_cache(maxsize=65536)(PorterStemmer().stem))
_SYNONYMS = SimpleNamespace(synsets=lru_cache(maxsize=65536)(wordnet.synsets if WORDNET else lambda word: ()))


def rouge(reference: str, prediction: str) -> tuple[float, float, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L of one report, by rouge-score."""
    found = _ROUGE.score(reference, prediction)
    return tuple(found[name].fmeasure for name in _ROUGE.rouge_types)


_ROUGE = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)

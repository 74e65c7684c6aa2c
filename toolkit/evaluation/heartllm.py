"""The arithmetic of the HeartLLM release (AAAI-26), for figures to put beside the paper's; `python -m toolkit.evaluation.score --compat heartllm`.

Theirs (github yangjinning/HeartLLM at e580089, utils/tools.py and utils/evaluation.py), and the same here:
- Questions, per question type: the generated text is stripped at its ends and split at ".", and the set of the parts is compared with the set of the
  answers, case-sensitive; the parts keep their spaces, and a "." at the end adds an empty part, so "yes." is wrong. There is no figure over all types.
- Reports: nltk's sentence BLEU on whitespace tokens, smoothing method1, weights (1, 0, 0, 0), (.5, .5, 0, 0), (.33, .33, .33, 0), (.25, .25, .25, .25);
  nltk's METEOR on the same tokens; F of `rouge` 1.0.1, 0 where it refuses an empty text; each the mean over reports. There is no exact match of reports.

Where a choice had to be made:
- The release knows five question types and stops at any other; here each is counted under its name.
- It counted a question of several ranks' padding twice and paired reports with those of another rank (PAPER.md, section 2, items 19 and 20); not done here.
- Its answers are joined by ".", ours by "; ", which its comparison takes for one answer: `exact_match` is theirs to the letter, and
  `exact_match_own_separator` what it would be had the model written "." for "; ". No answer of ECG-QA holds either. A prediction that a file holds
  as a list, as the release writes them, is split already: both are of that list as it is.
- Without WordNet on this machine the release stops; here METEOR is None.
"""

import sys
from collections.abc import Sequence
from statistics import fmean

from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge import Rouge

from toolkit.errors import UserError
from toolkit.evaluation.metrics import column, places
from toolkit.evaluation.text import HEARTLLM_WEIGHTS, WORDNET, meteor
from toolkit.tasks.answers import ANSWER_SEPARATOR

ROUGE = {"rouge-1": "rouge_1", "rouge-2": "rouge_2", "rouge-l": "rouge_l"}


def heartllm_compat(rows: Sequence[dict]) -> dict:
    """The scores of prediction rows as the release would have them, fractions in 0..1.

    Returns `{"questions": {<question type>: {"n", "correct", "exact_match", "exact_match_own_separator"}}, "reports": {"n", "bleu_1", ..., "bleu_4",
    "meteor": float | None, "rouge_1", "rouge_2", "rouge_l"} | None, "notes": [str]}`. Raises UserError without rows, and on a row of an
    unknown task or without a column.
    """
    if not rows:
        raise UserError("there is no prediction to judge: the split or the file is empty")
    reports = [(column(rows[i], "reference"), column(rows[i], "prediction")) for i in places(rows, "report")]
    notes = [] if WORDNET or not reports else ["METEOR: WordNet, without which the release does not run, is not installed here"]
    return {"questions": _questions([rows[i] for i in places(rows, "ecgqa")]), "reports": _reports(reports) if reports else None, "notes": notes}


def _questions(rows: Sequence[dict]) -> dict[str, dict]:
    found: dict[str, list[tuple[bool, bool]]] = {}
    for row in rows:
        prediction, answers = column(row, "prediction").strip(), set(column(row, "reference").split(ANSWER_SEPARATOR))
        theirs = set(row.get("predicted", prediction.split("."))) == answers
        ours = set(row.get("predicted", prediction.replace(ANSWER_SEPARATOR, ".").split("."))) == answers
        found.setdefault(column(row, "question_type"), []).append((theirs, ours))
    scores = {}
    for kind, judged in sorted(found.items()):
        theirs, ours = map(sum, zip(*judged))
        n = len(judged)
        scores[kind] = {"n": n, "correct": theirs, "exact_match": theirs / n, "exact_match_own_separator": ours / n}
    return scores


def _reports(pairs: Sequence[tuple[str, str]]) -> dict:
    known = {pair: _report(*pair) for pair in set(pairs)}
    each = [known[pair] for pair in pairs]
    scores = {name: fmean(one[name] for one in each) for name in each[0]}
    return {"n": len(pairs), **scores, "meteor": scores.get("meteor")}


def _report(reference: str, prediction: str) -> dict[str, float]:
    bleu = sentence_bleu([reference.split()], prediction.split(), weights=HEARTLLM_WEIGHTS, smoothing_function=SmoothingFunction().method1)
    scores = {f"bleu_{n}": float(score) for n, score in enumerate(bleu, 1)}
    return scores | ({"meteor": meteor(reference, prediction)} if WORDNET else {}) | _rouge(reference, prediction)


def _rouge(reference: str, prediction: str) -> dict[str, float]:
    limit = sys.getrecursionlimit()
    # `rouge` goes down a level for each word of both texts, and 1,000 levels are Python's own limit
    sys.setrecursionlimit(max(limit, len(reference.split()) + len(prediction.split()) + limit))
    try:
        found = Rouge().get_scores(prediction, reference)[0]
    except ValueError:  # an empty text
        return dict.fromkeys(ROUGE.values(), 0.0)
    finally:
        sys.setrecursionlimit(limit)
    return {name: found[theirs]["f"] for theirs, name in ROUGE.items()}

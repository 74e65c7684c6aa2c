"""From a sample of task shards to the token sequences of one group: the ECGs once, then a branch per question or report.

The prompt is ECG first: everything before the question is the same for all questions of an ECG, so that it is computed once.
"""

import numpy as np

from toolkit.ecg.gains import gain_text
from toolkit.shards.packing import Group, Sequence
from toolkit.tasks.answers import join_answers
from toolkit.tasks.vocabulary import ECGVocabulary

REPORT_INSTRUCTION = "Write the report of this ECG."

Gains = list[list[float]] | None


def ecg_ids(tokenizer, vocabulary: ECGVocabulary, codes: np.ndarray, gains: Gains = None) -> np.ndarray:
    """int64 [n]: BOS if the tokenizer has one, then each ECG between its start and end token; n depends on n_ecgs alone. codes: uint16 [n_ecgs, 313]."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return np.concatenate([np.array(bos, np.int64), vocabulary.wrap(codes, gains)])


def gain_ids(tokenizer, vocabulary: ECGVocabulary, gains: Gains) -> list[int]:
    """The gains in words; nothing if the model is not told them so. Their number depends on the ECG."""
    return tokenizer.encode("\n" + gain_text(gains), add_special_tokens=False) if vocabulary.gain_text else []


def prefix_ids(tokenizer, vocabulary: ECGVocabulary, codes: np.ndarray, gains: Gains = None) -> np.ndarray:
    """int64 [n]: what all tasks of a sample share, `ecg_ids` and `gain_ids`. gains: [n_ecgs, 12] mV, not looked at unless `needs_gains`."""
    return np.concatenate([ecg_ids(tokenizer, vocabulary, codes, gains), np.array(gain_ids(tokenizer, vocabulary, gains), np.int64)])


def question_text(task: dict) -> str:
    """What stands between the ECG and the answer."""
    return f"Question: {task['question']}\nAnswer:" if task["task"] == "ecgqa" else f"{REPORT_INSTRUCTION}\nReport:"


def reference_text(task: dict) -> str:
    """The text that a perfect model would answer."""
    return join_answers(task["answer"]) if task["task"] == "ecgqa" else task["report"]


def question_ids(tokenizer, task: dict) -> list[int]:
    """The prompt of a task. Tokenised apart from the answer, so that training and generation see the same tokens."""
    return tokenizer.encode("\n" + question_text(task), add_special_tokens=False)


def branch(tokenizer, task: dict) -> Sequence:
    """Prompt, answer and end token; the targets are the answer and the end token alone."""
    prompt = question_ids(tokenizer, task)
    answer = tokenizer.encode(" " + reference_text(task), add_special_tokens=False) + [tokenizer.eos_token_id]
    target = np.zeros(len(prompt) + len(answer), bool)
    target[len(prompt) :] = True
    return Sequence(np.array(prompt + answer, np.int64), target)


def task_group(tokenizer, vocabulary: ECGVocabulary, codes: np.ndarray, gains: Gains, tasks: list[dict]) -> Group:
    """The ECGs once, then every task as a branch."""
    ids = prefix_ids(tokenizer, vocabulary, codes, gains)
    return Group(Sequence(ids, np.zeros(len(ids), bool)), [branch(tokenizer, task) for task in tasks])


def forecast_group(tokenizer, vocabulary: ECGVocabulary, codes: np.ndarray, gains: Gains = None, branches: list[Sequence] | None = None) -> Group:
    """Pretraining on one ECG: every ECG token is predicted, the start, end and gain tokens are not. codes: uint16 [1, 313].

    The end token stands only before branches: last in a sequence nothing sees it, and without it 13 ECGs fit a row of 4,096, not 12.
    """
    ids = ecg_ids(tokenizer, vocabulary, codes, gains)
    ids = ids if branches else ids[:-1]
    return Group(Sequence(ids, (ids >= vocabulary.first) & (ids < vocabulary.first + vocabulary.codes)), branches or [])

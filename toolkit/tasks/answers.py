"""Answers of ECG-QA as text: one canonical string for training, a set for judging."""

ANSWER_SEPARATOR = "; "  # one class of ECG-QA contains commas, none a semicolon


def join_answers(answers: list[str]) -> str:
    """Multi-answers sorted, so that the same set of findings is always the same target string."""
    return ANSWER_SEPARATOR.join(sorted(answers))


def split_answers(text: str) -> frozenset[str]:
    """The set of answers in a string: lower case, stripped, no empty parts."""
    parts = (part.strip().lower() for part in text.split(ANSWER_SEPARATOR.strip()))
    return frozenset(part for part in parts if part)

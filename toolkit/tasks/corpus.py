"""Text that the words of `tiny` are learnt from: its BPE tokenizer is trained on it."""

from collections.abc import Iterator
from pathlib import Path

from toolkit.shards.reader import Shards
from toolkit.tasks.prompts import question_text, reference_text

WORDS = Path(__file__).with_name("clinical_words.txt")
MOST = 50_000  # samples that are looked at


def corpus(shards: Shards) -> Iterator[str]:
    """Clinical words, so that rare ones have a token too; the reports of token shards, or the tasks of task shards."""
    yield from WORDS.read_text().splitlines() * 20
    for i in range(min(len(shards), MOST)):
        meta = shards.meta(i)
        if "report" in meta:
            yield meta["report"]
        for task in meta.get("tasks", ()):
            yield f"{question_text(task)} {reference_text(task)}"

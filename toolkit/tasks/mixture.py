"""`--tasks`: which tasks a model is tuned on and how often each, as "ecgqa:0.7,report:0.3"; and text to replay against forgetting (`--text`)."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolkit.errors import UserError, first_line

ALL, TEXT = "all", "text"
WINDOW = 256  # tokens of a sample of --text


@dataclass(frozen=True)
class Share:
    """A part of a mixture. name: `all`, `text`, a kind of task (ecgqa, report) or a question type. weight: None, as many as there are."""

    name: str
    weight: float | None

    def wants(self, task: dict) -> bool:
        return self.name in (ALL, task["task"], task["question_type"])


EVERYTHING = Share(ALL, None)  # each ECG with all its tasks in one row


def parse_mixture(words: str) -> tuple[Share, ...]:
    """Shares of --tasks. Raises UserError naming it."""
    shares = []
    for part in words.split(","):
        name, colon, number = part.strip().partition(":")
        try:
            weight = float(number) if colon else None
        except ValueError:
            weight = -1.0
        if not name or (weight is not None and not 0 < weight < float("inf")):
            raise UserError(f"--tasks: {part.strip()!r} is no NAME or NAME:WEIGHT with a weight above 0, as in ecgqa:0.7,report:0.3")
        shares.append(Share(name, weight))
    names = [share.name for share in shares]
    if len(set(names)) < len(names):
        raise UserError(f"--tasks: {words!r} names a kind twice")
    if names == [TEXT]:
        raise UserError("--tasks: text alone is no tuning; name tasks beside it, as in all:0.9,text:0.1")
    if len({share.weight is None for share in shares}) > 1:
        raise UserError(f"--tasks: {words!r} gives some a weight and others none; give all one, or none (then each is as often as there are samples)")
    return tuple(shares)


def read_text(path: str | Path, tokenizer) -> np.ndarray:
    """int32 [n, WINDOW]: the documents of a file end to end, each with the end-of-text token behind it, cut into samples; what is left over is not used.

    A .jsonl file has a document a line, {"text": ...}; of any other file a document ends at an empty line. Raises UserError naming --text.
    """
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
        if str(path).endswith(".jsonl"):
            documents = [json.loads(line)["text"] for line in content.splitlines() if line.strip()]
        else:
            documents = content.replace("\r\n", "\n").split("\n\n")
        encode = lambda text: np.array([*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id], np.int32)
        ids = np.concatenate([np.zeros(0, np.int32), *(encode(text.strip()) for text in documents if text.strip())])
    except OSError as error:
        raise UserError(f"--text: {path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'--text: {path} is no UTF-8 text, or not a {{"text": ...}} a line ({first_line(error)})') from None
    if len(ids) < WINDOW:
        raise UserError(f"--text: {path} has {len(ids)} tokens, at least {WINDOW} are needed")
    return ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)

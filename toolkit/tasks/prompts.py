"""From a sample of task shards to token sequences: how ECGs and a question are put to a model (`--prompt`), and what it must answer.

ecg_first   the ECGs, then the question: what stands before the question is the same for all questions of an ECG, so that it is computed once
chat        the same within the backbone's own chat template, whose turns say who speaks
paper       as the authors' release puts it (model/heartllm.py): instructions and question, the ECG, "Answer:"; nothing to share. Its "<|start_prompt|>"
            and "<|end_prompt|>" are no tokens there either, and fall into pieces; the space between its start token and the ECG is left out
"""

import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from toolkit.ecg.gains import gain_text
from toolkit.errors import UserError, first_line
from toolkit.shards.packing import Group, Sequence
from toolkit.tasks.answers import join_answers
from toolkit.tasks.vocabulary import ECGVocabulary

REPORT_INSTRUCTION = "Write the report of this ECG."
PAPER_QUESTION = (
    "<|start_prompt|> Dataset description: The dataset contains electrocardiogram (ECG) time-series data. Task description: Based on a patient's 12-lead ECG"
    " signal (500 Hz) and background information, answer a clinical question related to cardiac health. Question:{question} <|end_prompt|> "
)
PAPER_REPORT = (
    "<|start_prompt|>Task description: Based on the given ECG signal embeddings, generate a ECG diagnostic report.Background:{background} <|end_prompt|>"
)
NAME = re.compile(r"[<\[][^<>\[\]\s]+[>\]]")  # as special tokens are named: <|ecg_end|>, </s>, [INST]
HERE = "[[ECG]]"  # where the ECGs go in a rendered chat
# Llama 3's templates say today's date: a run would go on with, and be judged by, other prompts than it began with
NO_DATE = "{%- macro strftime_now(format) -%}01 Jan 2026{%- endmacro -%}"

Style = Literal["ecg_first", "paper", "chat"]
Gains = list[list[float]] | None


@dataclass(frozen=True)
class Prompts:
    """What `--prompt`, `--gain_text` and `--background` chose; an adapter remembers it. Age and sex are all that is ever said of a patient."""

    style: Style = "ecg_first"
    gain_text: bool = False
    background: bool = False

    def check(self, tokenizer, vocabulary: ECGVocabulary) -> None:
        """Raises UserError naming the argument if this backbone cannot be asked so."""
        if self.style not in get_args(Style):
            raise UserError(f"--prompt: {self.style!r} is none of {', '.join(get_args(Style))}")
        if self.style == "chat" and not tokenizer.chat_template:
            raise UserError("--prompt chat: the tokenizer of this backbone has no chat template; use --prompt ecg_first, or an instruct model")
        if self.style == "chat":
            try:
                _chat(tokenizer, "\nquestion")
                end_id(tokenizer, self)
            except Exception as error:  # a template is a program of its own
                raise UserError(f"--prompt chat: the chat template of this backbone cannot be used ({first_line(error)}); use --prompt ecg_first") from error
        if self.gain_text and vocabulary.gain_first is not None:
            raise UserError("--gain_text: the backbone has gain tokens, which say the same; leave it out")
        if self.gain_text and self.style == "paper":
            raise UserError("--gain_text: --prompt paper has no place for it; leave it out or use --prompt ecg_first")


def ecg_ids(tokenizer, vocabulary: ECGVocabulary, codes: np.ndarray, gains: Gains = None) -> np.ndarray:
    """int64 [n]: BOS if the tokenizer has one, then each ECG between its start and end token; n depends on n_ecgs alone. codes: uint16 [n_ecgs, 313]."""
    return np.concatenate([np.array(_bos(tokenizer), np.int64), vocabulary.wrap(codes, gains)])


def shared_ids(tokenizer, vocabulary: ECGVocabulary, prompts: Prompts, codes: np.ndarray, meta: dict) -> np.ndarray:
    """int64 [n]: what stands before the question of every task of a sample; empty with `paper`. meta: the sample's json."""
    if prompts.style == "paper":
        return np.zeros(0, np.int64)
    words = "".join("\n" + said for said in (prompts.gain_text and gain_text(meta["gains"]), prompts.background and background_text(meta)) if said)
    head = _text_ids(tokenizer, _chat(tokenizer, "")[0]) if prompts.style == "chat" else _bos(tokenizer)
    return np.concatenate([np.array(head, np.int64), vocabulary.wrap(codes, meta.get("gains")), np.array(_text_ids(tokenizer, words), np.int64)])


def prompt_ids(tokenizer, vocabulary: ECGVocabulary, prompts: Prompts, codes: np.ndarray, meta: dict, task: dict) -> np.ndarray:
    """int64 [n]: what stands between `shared_ids` and the answer. Tokenised apart from the answer, so that training and generation see the same tokens."""
    task = {key: _plain(tokenizer, value) if key == "question" else value for key, value in task.items()}
    if prompts.style == "ecg_first":
        ids = _text_ids(tokenizer, "\n" + question_text(task))
    elif prompts.style == "chat":
        ids = _text_ids(tokenizer, _chat(tokenizer, "\n" + (task["question"] if task["task"] == "ecgqa" else REPORT_INSTRUCTION))[1])
    else:
        before, after = paper_texts(task, background_text(meta) if prompts.background else "")
        ids = [*_bos(tokenizer), *_text_ids(tokenizer, before), *vocabulary.wrap(codes, meta.get("gains")), *_text_ids(tokenizer, after)]
    return np.array(ids, np.int64)


def answer_ids(tokenizer, prompts: Prompts, task: dict) -> np.ndarray:
    """int64 [n]: the answer and the token that ends it."""
    text = (" " if prompts.style == "ecg_first" else "") + _plain(tokenizer, reference_text(task))
    return np.array([*_text_ids(tokenizer, text), end_id(tokenizer, prompts)], np.int64)


def end_id(tokenizer, prompts: Prompts) -> int:
    """The token that ends an answer: of the end of a turn in a chat, else of the end of a text."""
    if prompts.style == "chat":
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": HERE}]
        _, closing = _rendered(tokenizer, turns)
        closing = _text_ids(tokenizer, closing.lstrip())
        if closing:
            return closing[0]
    return tokenizer.eos_token_id


def question_text(task: dict) -> str:
    """What stands between the ECG and the answer of `ecg_first`."""
    return f"Question: {task['question']}\nAnswer:" if task["task"] == "ecgqa" else f"{REPORT_INSTRUCTION}\nReport:"


def reference_text(task: dict) -> str:
    """The text that a perfect model would answer."""
    return join_answers(task["answer"]) if task["task"] == "ecgqa" else task["report"]


def background_text(meta: dict) -> str:
    """Age and sex of the patient of each ECG in words, a line an ECG: "Patient: 63 years, female."; '' where neither is known.

    Raises UserError naming --background for shards that do not hold them.
    """
    if "ages" not in meta:
        raise UserError("--background: the shards hold no age and sex; make them again with `python -m sharding.shard_tasks`")
    lines = []
    for number, (age, sex) in enumerate(zip(meta["ages"], meta["sexes"]), 1):
        known = [f"{int(age)} years" if age < 90 else "90 years or older"] if age is not None else []
        known += [sex] if sex else []
        if known:
            lines.append(f"Patient{f' of ECG {number}' if len(meta['ages']) > 1 else ''}: {', '.join(known)}.")
    return "\n".join(lines)


def paper_texts(task: dict, background: str) -> tuple[str, str]:
    """Text before and after the ECG as the release has them. Its question promises a background and gives none; its report gives one."""
    if task["task"] == "ecgqa":
        return PAPER_QUESTION.format(question=task["question"]), "Answer:"
    return PAPER_REPORT.format(background=background), " Report:"


def branch(tokenizer, prompts: Prompts, task: dict, prompt: np.ndarray) -> Sequence:
    """Prompt, answer and end token, of which answer and end token alone are targets."""
    ids = np.concatenate([prompt, answer_ids(tokenizer, prompts, task)])
    return Sequence(ids, np.arange(len(ids)) >= len(prompt))


def task_groups(tokenizer, vocabulary: ECGVocabulary, prompts: Prompts, codes: np.ndarray, meta: dict, tasks: list[dict]) -> list[Group]:
    """The ECGs once and every task as a branch; or, where nothing is shared, a group for each task. codes: uint16 [n_ecgs, 313]; meta: the sample's json,
    with `features` of its code tokens if they are to be continuous (`features.ECGFeatures`).
    """
    features = meta.get("features")
    shared = shared_ids(tokenizer, vocabulary, prompts, codes, meta)
    branches = [branch(tokenizer, prompts, task, prompt_ids(tokenizer, vocabulary, prompts, codes, meta, task)) for task in tasks]
    if not len(shared):
        return [Group(replace(one, features=features), []) for one in branches]
    return [Group(Sequence(shared, np.zeros(len(shared), bool), features), branches)]


def forecast_group(tokenizer, vocabulary: ECGVocabulary, codes: np.ndarray, gains: Gains = None, branches: list[Sequence] | None = None) -> Group:
    """Pretraining on one ECG: every ECG token is predicted, the start, end and gain tokens are not. codes: uint16 [1, 313].

    The end token stands only before branches: last in a sequence nothing sees it, and without it 13 ECGs fit a row of 4,096, not 12.
    """
    ids = ecg_ids(tokenizer, vocabulary, codes, gains)
    ids = ids if branches else ids[:-1]
    return Group(Sequence(ids, (ids >= vocabulary.first) & (ids < vocabulary.first + vocabulary.codes)), branches or [])


def _bos(tokenizer) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _plain(tokenizer, text: str) -> str:
    """A dataset's own words, in which the name of a special token is no token: "<|ecg_end|>" would end the ECG, and becomes "< |ecg_end|>"."""
    return NAME.sub(lambda name: name[0][0] + " " + name[0][1:] if name[0] in tokenizer.added_tokens_encoder else name[0], text)


def _text_ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False) if text else []


def _chat(tokenizer, said: str) -> tuple[str, str]:
    """A chat in which the user shows the ECGs and goes on with `said`, up to the assistant's answer: its text before and after the ECGs."""
    return _rendered(tokenizer, [{"role": "user", "content": HERE + said}], add_generation_prompt=True)


def _rendered(tokenizer, turns: list[dict], **more) -> tuple[str, str]:
    """The chat's text before and after `HERE`. Raises ValueError if the template leaves it out."""
    template = NO_DATE + tokenizer.get_chat_template()
    before, here, after = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **more).partition(HERE)
    if not here:
        raise ValueError("it leaves out what the user says")
    return before, after

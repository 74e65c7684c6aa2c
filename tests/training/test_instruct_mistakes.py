"""What launchers/instruct.py says to arguments that do not fit each other, and what it does with answers that are too long for the backbone."""

import json
import shutil
import sys

import numpy as np
import pytest
from transformers import AutoTokenizer

from launchers import instruct
from tests.training.conftest import write_tasks
from toolkit.errors import UserError
from toolkit.lm.vocabulary import ecg_vocabulary
from toolkit.shards.reader import Shards
from toolkit.tasks.instruct import TaskData
from toolkit.tasks.mixture import parse_mixture
from toolkit.tasks.prompts import Prompts
from toolkit.training import early_stopping


def with_context(backbone, folder, tokens):
    """A copy of a backbone with so many tokens of context."""
    shutil.copytree(backbone, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": tokens}))
    return folder


@pytest.fixture(scope="session")
def folders(task_corpus, tmp_path_factory):
    """Named folders for the words in braces of MISTAKES."""
    out = tmp_path_factory.mktemp("mistakes")
    write_tasks(out / "other", tokenizer="1" * 16)
    write_tasks(out / "mixed", first_patient=24)  # its train begins with the six patients of the other's valid
    (out / "short.txt").write_text("too short")
    (out / "lines.jsonl").write_text('{"words": "no text"}\n')
    for name, file in (("adapter", "adapter_config.json"), ("unfinished", "arguments.json")):
        (out / name).mkdir()
        (out / name / file).write_text("{}")
    with_context(task_corpus / "known", out / "small", 600)
    return {path.stem: path for path in out.iterdir()} | {path.stem: path for path in task_corpus.iterdir()}


MISTAKES = [
    ("--shards {other}", "--shards: they hold tokens of ECG tokenizer 1{16}, --backbone .*known was trained on those of 0{16}"),
    ("--shards {tasks} {other}", "--shards: the folders hold tokens of 2 ECG tokenizers \\(0{16}, 1{16}, in their order"),
    ("--shards {tasks} {mixed}", "--shards: 6 patients of valid in .*tasks are in train of .*mixed"),
    ("--tasks ecgqa:x,report:1", "--tasks: 'ecgqa:x' is no NAME or NAME:WEIGHT"),
    ("--tasks ecgqa:-1,report:1", "--tasks: 'ecgqa:-1' is no NAME"),
    ("--tasks ecgqa:0.5,report", "gives some a weight and others none"),
    ("--tasks ecgqa,ecgqa", "names a kind twice"),
    ("--tasks text:1", "text alone is no tuning"),
    ("--tasks ecgqa:1,reports:1", "--tasks: there is no 'reports' in split 'train' .* report, .*single-verify"),
    ("--tasks ecgqa:1,report:0.0001", "--tasks: a share is less than one in 1000; raise the smallest weight"),
    ("--text {text}", "--text and --tasks go together"),
    ("--tasks all:0.9,text:0.1", "--text and --tasks go together"),
    ("--tasks all:0.9,text:0.1 --text nowhere", "--text: nowhere cannot be read"),
    ("--tasks all:0.9,text:0.1 --text {short}", "--text: .*short.txt has .* tokens, at least 256 are needed"),
    ("--tasks all:0.9,text:0.1 --text {lines}", "--text: .*lines.jsonl is no UTF-8 text"),
    ("--prompt chat", "--prompt chat: the tokenizer of this backbone has no chat template"),
    ("--prompt paper --gain_text true", "--gain_text: --prompt paper has no place for it"),
    ("--backbone {adapter}", "--backbone: .*adapter is an adapter"),
    ("--backbone {unfinished}", "--backbone: the training of .*unfinished is not complete"),
    ("--backbone {small}", "--backbone: its context of 600 tokens does not hold the 626 of a sample's ECGs"),
    ("--early_stopping_patience 2", "needs --eval_steps"),
    ("--lora_r 0", "--lora_r must be at least 1"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_named_and_leaves_no_run(folders, tmp_path, monkeypatch, words, message):
    good = {"--deepspeed": "ds_configs/zero2.json", "--backbone": folders["known"], "--shards": folders["tasks"], "--output_dir": tmp_path / "out"}
    words = words.format(**folders)
    kept = [str(word) for flag, value in good.items() if flag not in words.split() for word in (flag, value)]
    monkeypatch.setattr(sys, "argv", ["instruct.py", *kept, *words.split()])
    with pytest.raises(UserError, match=message):
        instruct.main()
    assert not (tmp_path / "out").exists()


def pairs(folders, context):
    tokenizer = AutoTokenizer.from_pretrained(folders["known"])
    mixture = parse_mixture("comparison_consecutive-verify")
    return TaskData([Shards.open(folders["tasks"], "train")], tokenizer, ecg_vocabulary(tokenizer), Prompts(), mixture=mixture, context=context)


def test_answers_beyond_the_context_are_cut_or_left_out(folders, fork, tmp_path):
    free = pairs(folders, None)
    rows = [free.batch([(0, i)]).inputs for i in range(len(free))]
    longest = {len(row.input_ids) for row in rows}
    assert len(free) == 6 and len(longest) == 1  # all ask the same, and yes and no are one token each
    whole, answer = longest.pop(), len(rows[0].targets)
    for lost in range(answer + 1):
        data = pairs(folders, whole - lost)
        row = data.batch([(0, i) for i in range(6)]).inputs  # at last a row without a target
        assert (data.cut, data.left_out) == (6 * (0 < lost < answer), 6 * (lost == answer))
        assert np.array_equal(row.targets, np.concatenate([one.targets[: answer - lost] for one in rows]))
    backbone = with_context(folders["known"], tmp_path / "cut", whole - 1)
    given = {
        "deepspeed": "ds_configs/zero0.json", "backbone": backbone, "shards": folders["tasks"], "output_dir": tmp_path / "run", "max_steps": 3,
        "per_device_train_batch_size": 4, "precision": "fp32", "tasks": "comparison_consecutive-verify", "max_eval_answers": 1,
    }  # fmt: skip
    words = [word for flag, value in given.items() for word in (f"--{flag}", value)]
    run = fork(1, words, tmp_path / "log", before=["import toolkit.training.tuning as tuning; tuning.SHOWN = tuning.WATCHED = 2"], launcher="instruct")
    assert run.wait() == [0], run.text()[-4000:]
    assert f"12 answers were cut to the backbone's context of {whole - 1} tokens, 0 tasks left out" in run.text().splitlines()[-1]


def test_of_equal_matches_the_lower_loss_is_better():
    def best(*seen):
        found = None
        for step, (match, loss) in enumerate(seen, 1):
            found = early_stopping.better(found, {"eval_exact_match": match, "eval_loss": loss}, "eval_exact_match", step)
        return found["step"]

    nan = float("nan")
    assert best((0.5, 1.0), (0.4, 0.1)) == 1 and best((0.4, 0.1), (0.5, 1.0)) == 2
    assert best((0.5, 1.0), (0.5, 0.9)) == 2 and best((0.5, 0.9), (0.5, 1.0)) == 1 and best((0.5, 1.0), (0.5, 1.0)) == 1
    assert best((0.5, nan), (0.5, 1.0)) == 2 and best((0.5, 1.0), (0.5, nan)) == 1 and best((nan, 0.1), (0.1, 9.0)) == 2
    assert best((0.1, 9.0), (nan, 0.1)) == 1
    loss = {"eval_loss": 1.0}
    assert early_stopping.better({"step": 1, "metrics": loss}, {"eval_loss": 0.9}, "eval_loss", 2)["step"] == 2
    assert early_stopping.better({"step": 1, "metrics": loss}, loss, "eval_loss", 2)["step"] == 1

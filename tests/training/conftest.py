"""Runs of pretraining and instruction tuning of a model of 0.2 M parameters on random ECG tokens, in forked ranks: about three seconds each."""

import copy
import itertools
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Started:
    """A run under way. `wait()` gives the exit codes of its ranks; `text()` what they printed."""

    pids: list[int]
    log: Path
    process: subprocess.Popen
    codes: list[int] = field(default_factory=list)

    def wait(self) -> list[int]:
        if not self.codes:
            self.codes = json.loads(self.process.stdout.readline())
        return self.codes

    def text(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="session")
def fork():
    """fork(world, argv, log, before=[...], launcher="pretrain", **environment) -> Started; one at a time."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.training.zygote"], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def start(world: int, argv: list, log: Path, before: list[str] | None = None, launcher: str = "pretrain", **more) -> Started:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            more = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": s.getsockname()[1], **more}
        order = {"launcher": launcher, "world": world, "argv": list(map(str, argv)), "log": str(log), "before": before or [], "environment": more}
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        while not (line := process.stdout.readline()).startswith("["):  # what the imports print
            assert process.poll() is None, "the zygote is dead"
        return Started(json.loads(line), log, process)

    yield start
    process.stdin.close()
    process.wait(30)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Folder with `shards` (48 ECGs in train, 9 in valid, with reports of different lengths) and `backbone`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from toolkit.lm.backbone import load_backbone
    from toolkit.shards.writer import write_index, write_split

    out, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    (out / "shards").mkdir()
    words = "sinus rhythm normal ecg atrial fibrillation left bundle branch block old infarction".split()

    def samples(split, n):
        for i in range(n):
            codes = (rng.integers(0, 40) + np.arange(313) * 7 + rng.integers(0, 30, 313)) % 1296
            report = " ".join(rng.choice(words, rng.integers(1, 30)))
            yield f"{split}_{i:03d}", codes.astype(np.uint16)[None], {"report": report, "gains": [[0.1] * 12]}

    splits = {name: write_split(out / "shards", name, samples(name, n), 16) for name, n in (("train", 48), ("valid", 9))}
    write_index(out / "shards", splits, kind="tokens", codes=1296, levels=[6, 6, 6, 6], tokenizer="0" * 16)
    _, tokenizer = load_backbone("tiny", lambda: words * 20, 0)
    for name, tied in (("backbone", True), ("untied", False)):
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                        num_key_value_heads=1, tie_word_embeddings=tied, max_position_embeddings=512)  # fmt: skip
        )
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    return out


@pytest.fixture(scope="session")
def task_corpus(tmp_path_factory):
    """Folder with `tasks` (task shards, 24 samples in train and 6 in valid, every fourth of two ECGs), the backbones `known` and `untied` that know their
    ECG tokens, `raw` that does not, and text.txt, for --text. What is asked follows from an ECG's first code."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from toolkit.lm.backbone import load_backbone, save_stamp
    from toolkit.lm.vocabulary import extend

    out = tmp_path_factory.mktemp("task_corpus")
    index, words = write_tasks(out / "tasks"), "yes no odd even sinus rhythm normal ecg with beats first code".split()
    (out / "text.txt").write_text("\n\n".join(" ".join(words[i % 7 : i % 7 + 5]) for i in range(600)))
    _, tokenizer = load_backbone("tiny", lambda: words * 20, 0)
    for name in ("raw", "known", "untied"):
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                        num_key_value_heads=1, tie_word_embeddings=name != "untied", max_position_embeddings=1024)  # fmt: skip
        )
        mine = copy.deepcopy(tokenizer)
        if name != "raw":
            extend(model, mine, index["levels"], 0, knows_text=True)
        model.save_pretrained(out / name)
        mine.save_pretrained(out / name)
        if name != "raw":
            save_stamp(out / name, index, knows_text=True)
    return out


def write_tasks(folder: Path, tokenizer: str = "0" * 16, first_patient: int = 0) -> dict:
    """Task shards as `task_corpus` has them; returns their index. tokenizer: the fingerprint they name. A patient a sample, numbered on from train to valid."""
    from toolkit.shards.writer import write_index, write_split

    folder.mkdir()
    rng, patients = np.random.default_rng(0), itertools.count(first_patient)

    def samples(split, n):
        for i in range(n):
            first = rng.integers(0, 40, 1 + (i % 4 == 3))
            codes = (first[:, None] + np.arange(313) * 7 + rng.integers(0, 30, (len(first), 313)) * (np.arange(313) > 0)) % 1296
            asked = {
                "single-verify": ("Is the first code below 30?", ["yes" if first[0] < 30 else "no"]),
                "single-choose": ("Is it odd or even?", ["odd" if first[0] % 2 else "even"]),
                "single-query": ("What is there?", [word for bit, word in enumerate(("sinus rhythm", "beats")) if first[0] >> bit & 1] or ["none"]),
            }
            if len(first) == 2:
                asked = {"comparison_consecutive-verify": ("Is the second higher?", ["yes" if first[1] > first[0] else "no"])}
            tasks = [
                {"id": f"{kind}-{split}-{i}", "task": "ecgqa", "question_type": kind, "question": question, "answer": answer}
                for kind, (question, answer) in asked.items()
            ]
            if len(first) == 1 and i % 3:
                report = " ".join(["sinus rhythm with"] + ["beats"] * int(first[0] // 4))
                tasks.append({"id": f"report-{split}-{i}", "task": "report", "question_type": "report", "report": report})
            of_each = {"patients": f"made_{next(patients)}", "gains": [0.1] * 12, "ages": 50.0 + i, "sexes": "female" if i % 2 else "male"}
            meta = {"source": "made", "split": split, "record_ids": [f"{split}{i}-{k}" for k in range(len(first))], "tasks": tasks}
            yield f"{split}_{i:03d}", codes.astype(np.uint16), meta | {name: [value] * len(first) for name, value in of_each.items()}

    splits = {}
    for split, n in (("train", 24), ("valid", 6)):
        made = list(samples(split, n))
        kinds = Counter(task["question_type"] for *_, meta in made for task in meta["tasks"])
        splits[split] = {**write_split(folder, split, made, 16), "tasks": dict(sorted(kinds.items()))}
    write_index(folder, splits, kind="tasks", made_from="0" * 16, codes=1296, levels=[6] * 4, tokens_per_ecg=313, shard_size=16, tokenizer=tokenizer)
    return json.loads((folder / "index.json").read_text())


@pytest.fixture(scope="session")
def exact_configs(tmp_path_factory):
    """{stage: path} of ds_configs whose ZeRO-3 cuts even the smallest parameter."""
    folder = tmp_path_factory.mktemp("ds_configs")
    for stage in range(4):
        config = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
        if stage == 3:
            # a model this small would else stay whole on every rank, and no forward would wait for another rank's
            limits = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")
            config["zero_optimization"] |= dict.fromkeys(limits, 0)
        (folder / f"zero{stage}.json").write_text(json.dumps(config))
    return {stage: folder / f"zero{stage}.json" for stage in range(4)}


def losses(folder: Path) -> dict[int, float]:
    """step -> training loss, as log.jsonl has it; a step that is there twice fails."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert len(dict(found)) == len(found), "a step was logged twice"
    return dict(found)

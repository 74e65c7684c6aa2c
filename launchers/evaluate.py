"""Answer every task of a split and judge the answers, beside what is reached without looking at the ECG.

deepspeed launchers/evaluate.py --model runs/demo/instruct --shards runs/demo/tasks --split test --output_dir runs/demo/evaluate

Writes predictions.jsonl (one line a task, appended while it runs), metrics.json and report.html. The split is spread over the ranks; every task is answered
once. Killed, the same command goes on with what is left, on any number of ranks.

Controls, in the same table: the majority answer of the training split for the question's template (majority), and for what it asks about too (blind); the
most frequent report; the model itself shown another patient's ECG (shuffled) or a flat one (flat). What it has more than shuffled, it reads from the ECG.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from toolkit.errors import UserError
from toolkit.evaluation import blind
from toolkit.evaluation.answering import PREDICTIONS, answer_all, survey, write_rows
from toolkit.evaluation.cards import ecgs, tokenizer_of
from toolkit.evaluation.html_report import write_report
from toolkit.evaluation.inputs import Inputs, other_patients
from toolkit.evaluation.leak import check_leak, trained_on
from toolkit.evaluation.metrics import read_classes
from toolkit.evaluation.predict import kinds_of, ordinals, predict, speaker
from toolkit.evaluation.table import table, text_table
from toolkit.files import run_folder, write_text
from toolkit.lm.backbone import backbone_digest
from toolkit.lm.trained import load_trained
from toolkit.shards.order import spaced
from toolkit.shards.reader import Shards
from toolkit.tokenizer.features import ECGFeatures
from toolkit.training.arguments import LaunchArguments, arg, as_record, parse
from toolkit.training.distributed import launcher, start, wants_bf16
from toolkit.training.shards import ShardArguments, open_shards

ARGUMENTS, METRICS = "arguments.json", "metrics.json"
# what may differ when a folder is gone on with; `--model` and `--shards` are known by their digests
FREE = ("shard_cache", "shard_cache_gb", "local_rank", "output_dir", "model", "shards", "train_shards", "on_leak")


@dataclass(kw_only=True)
class EvaluateArguments(ShardArguments, LaunchArguments):
    output_dir: str = arg("Folder of the results: predictions.jsonl, metrics.json, report.html. The same command on an existing folder goes on.")
    seed: int = arg("Seed of whose ECG stands in for whose, of noise and of the intervals.", 42)
    model: str = arg("Folder written by launchers/instruct.py (an adapter), launchers/pretrain.py or `python -m toolkit.lm.merge` (a model).")
    shards: str = arg("Task shards written by `python -m sharding.shard_tasks`: a folder, or the URL of one (s3://, gs://, https://, ...).")
    split: Literal["train", "valid", "test"] = arg("Split to judge. The majority answers are always those of train.", "test")
    train_shards: list[str] = arg("Shards that the model was trained on, to refuse patients that are in both. Default: those that the model remembers.", [])
    on_leak: Literal["error", "warn"] = arg(
        "Where a patient of the split is in the training shards. error: stop. warn: go on, and say so beside the figures.", "error"
    )
    answers: Literal["free", "constrained"] = arg(
        "free: what the model generates. constrained: the likeliest of the answers that there are to a question's template, and their likelihoods.", "free"
    )
    classes: str | None = arg("ECG-QA's answers_for_each_template.csv: what an answer may be. Default: what the training split answers.", None)
    controls: Literal["all", "words"] = arg("all: the model is shown other ECGs too (three times the work). words: majority answers alone.", "all")
    noise_db: list[float] = arg("Also show the ECG under added noise of these signal-to-noise ratios (dB); needs the recordings. 20 10 0, for example.", [])
    per_device_eval_batch_size: int = arg("ECGs (with all their questions) per rank and batch.", 8)
    max_new_tokens: int = arg("Longest answer or report.", 128)
    precision: Literal["auto", "bf16", "fp32"] = arg("auto: bf16 where the processor is fast at it, else fp32.", "auto")
    report_ecgs: int = arg("ECGs of report.html, evenly spaced over the split, each with all its tasks and a drawing. 0: all.", 100)

    def __post_init__(self):
        super().__post_init__()
        if self.report_ecgs < 0:
            raise UserError(f"--report_ecgs must be at least 0, not {self.report_ecgs}")


def main() -> None:
    args = parse(EvaluateArguments, __doc__)
    started = time.time()
    (shards,), _ = open_shards(args, [args.split], "tasks")
    looked, leak = check_leak(shards, args.train_shards or trained_on(args.model), bool(args.train_shards), args)
    classes = read_classes(args.classes) if args.classes else None
    model, tokenizer, vocabulary, prompts, adapter = load_trained(args.model, shards.index, torch.bfloat16 if wants_bf16(args) else torch.float32)
    ecg_tokenizer = tokenizer_of(shards)
    features = ECGFeatures(ecg_tokenizer, adapter.mean, adapter.std) if adapter else None
    ranks, folder = start(), run_folder(args.output_dir)  # before the hours of generation, not after
    made = {name: value for name, value in as_record(args).items() if name not in FREE}
    made |= {"shards digest": shards.digest, "model digest": backbone_digest(args.model, model)}
    check_same(folder, made)
    if (folder / METRICS).is_file():
        if ranks.main:
            print(f"{folder} is complete already")
        return
    if ranks.main:
        write_text(folder / ARGUMENTS, json.dumps(made, indent=2))
        print(leak or f"no patient of {args.split} is in the training shards ({', '.join(looked)})", flush=True)
    baseline, known = majorities(args, shards, looked)
    classes = classes or (baseline["classes"] if baseline else None)
    if args.answers == "constrained" and not classes:
        raise UserError("--answers constrained: there is no training split to take the answers from; name ECG-QA's answers_for_each_template.csv by --classes")
    for module in (model, adapter) if adapter else (model,):
        module.to(ranks.device)
    asked = survey(shards)
    patients = [one.patient for one in asked]
    inputs = Inputs(shards, ecg_tokenizer, features, other_patients(patients, [one.n_ecgs for one in asked], args.seed), args.seed)
    say = speaker((model, tokenizer, vocabulary, prompts), args.max_new_tokens, ranks.device, adapter, classes if args.answers == "constrained" else None)
    kinds, numbers = kinds_of(args.controls, args.noise_db), ordinals(patients)
    rows = answer_all(folder, asked, args.per_device_eval_batch_size, lambda batch: predict(batch, inputs, kinds, say, baseline, numbers), ranks)
    if ranks.main:
        write_rows(folder / PREDICTIONS, rows)
        metrics = table(rows, classes)
        metrics["notes"] += [leak] if leak else []
        metrics["run"] = {
            "model": args.model, "shards": args.shards, "split": args.split, "ECGs": len(shards), "patients": len(numbers), "tasks": len(rows),
            "answers": args.answers, "majority answers of": known, "leak check": leak or f"no patient is in {', '.join(looked)}",
            "ranks": ranks.world, "seconds": round(time.time() - started, 1),
        }  # fmt: skip
        metrics["made"] = made
        chosen = spaced(len(shards), args.report_ecgs or len(shards))
        of_report = set(chosen)
        write_report(folder / "report.html", metrics, [row for row in rows if row["sample"] in of_report], ecgs(shards, chosen, ecg_tokenizer), metrics["run"])
        write_text(folder / METRICS, json.dumps(metrics, indent=2))  # last: it says that all is there
        print(text_table(metrics))
        print(f"report: {(folder / 'report.html').resolve()}")


def check_same(folder: Path, made: dict) -> None:
    """Raises UserError if the folder holds, or began, another evaluation, naming what is different."""
    path = folder / ARGUMENTS
    if not path.is_file():
        if (folder / PREDICTIONS).exists() or (folder / METRICS).exists():
            raise UserError(f"--output_dir {folder} holds an evaluation of an older version; name a new folder")
        return
    before = json.loads(path.read_text())
    differ = [f"{name} {before.get(name)!r}, not {made.get(name)!r}" for name in made | before if before.get(name) != made.get(name)]
    if differ:
        raise UserError(f"--output_dir {folder} holds the evaluation with {'; '.join(differ)}; name a new folder")


def majorities(args: EvaluateArguments, shards: Shards, trained: list[str]) -> tuple[dict | None, str]:
    """The majority answers of the dataset's own training split, which is harder to beat; if it has none, of what the model was trained on; and of which."""
    for folder in [args.shards, *trained]:
        try:
            train = Shards.open(folder, "train", kind="tasks", cache=args.shard_cache, cache_gb=args.shard_cache_gb)
        except UserError:
            continue
        return blind.fit(task for i in range(len(train)) for task in train.meta(i)["tasks"]), f"train of {folder}"
    return None, "no training split at hand"


if __name__ == "__main__":
    launcher(main)()

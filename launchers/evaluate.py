"""Answer every task of a split and judge the answers, beside what is reached without looking at the ECG.

deepspeed launchers/evaluate.py --model runs/demo/instruct --shards runs/demo/tasks --split test --output_dir runs/demo/evaluate

Writes predictions.jsonl (one line a task, appended while it runs), metrics.json and report.html. The split is spread over the ranks; every task is answered
once. Killed, the same command goes on with what is left, on any number of ranks.

Controls, in the same table: the majority answer of the training split for the question's template (majority), and for what it asks about too (blind); the
most frequent report; the model itself shown another patient's ECG (shuffled) or a flat line (flat). What it has more than shuffled, it reads from the ECG;
a flat line is nothing it was trained on.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from toolkit.errors import UserError
from toolkit.evaluation import blind
from toolkit.evaluation.answering import MADE, METRICS, PREDICTIONS, answer_all, check_same, survey, write_rows
from toolkit.evaluation.cards import ecgs, tokenizer_of
from toolkit.evaluation.html_report import write_report
from toolkit.evaluation.inputs import Inputs, other_patients
from toolkit.evaluation.leak import check_leak, remembered, short
from toolkit.evaluation.metrics import read_classes
from toolkit.evaluation.predict import check_classes, kinds_of, ordinals, predict, speaker
from toolkit.evaluation.table import table, text_table
from toolkit.files import digest, run_folder, write_text
from toolkit.lm.trained import load_trained, model_digest
from toolkit.shards.order import spaced
from toolkit.tokenizer.features import ECGFeatures
from toolkit.training.arguments import LaunchArguments, arg, as_record, parse
from toolkit.training.distributed import launcher, start, wants_bf16
from toolkit.training.shards import ShardArguments, open_shards

# what may differ when a folder is gone on with, or is known by a digest
FREE = ("shard_cache", "shard_cache_gb", "local_rank", "output_dir", "model", "shards", "train_shards", "on_leak", "classes", "precision", "report_ecgs")


@dataclass(kw_only=True)
class EvaluateArguments(ShardArguments, LaunchArguments):
    stage: ClassVar = "evaluate"

    output_dir: str = arg("Folder of the results: predictions.jsonl, metrics.json, report.html. The same command on an existing folder goes on.")
    seed: int = arg("Seed of whose ECG stands in for whose, and of noise.", 42)
    model: str = arg("Folder written by launchers/instruct.py (an adapter), launchers/pretrain.py or `python -m toolkit.lm.merge` (a model).")
    shards: str = arg("Task shards written by `python -m sharding.shard_tasks`: a folder, or the URL of one (s3://, gs://, https://, ...).")
    split: Literal["train", "valid", "test"] = arg("Split to judge. The majority answers are always those of train.", "test")
    train_shards: list[str] = arg("Shards that the model was trained on, beside those that it remembers: patients that are in both are refused.", [])
    on_leak: Literal["error", "warn"] = arg(
        "Where a patient of the split is in the training shards. error: stop. warn: go on, and say so beside the figures.", "error"
    )
    answers: Literal["free", "constrained"] = arg(
        "free: what the model generates. constrained: the likeliest of the answers that there are to a question's template, and their likelihoods.", "free"
    )
    classes: str | None = arg("ECG-QA's answers_for_each_template.csv: what an answer may be. Default: what the training split answers.", None)
    controls: Literal["all", "words"] = arg(
        "all: the model is shown another patient's ECG and a flat one too, three times the work. words: majority answers alone.", "all"
    )
    noise_db: list[float] = arg("Also show the ECG under added noise of these signal-to-noise ratios (dB); needs the recordings. 20 10 0, for example.", [])
    per_device_eval_batch_size: int = arg("ECGs (with all their questions) per rank and batch.", 8)
    max_new_tokens: int = arg("Longest answer or report.", 128)
    precision: Literal["auto", "bf16", "fp32"] = arg("auto: bf16 where the processor is fast at it, else fp32.", "auto")
    report_ecgs: int = arg("ECGs that report.html draws, evenly spaced over the split; it lists all answers. 0: all.", 100)

    def __post_init__(self):
        super().__post_init__()
        if self.report_ecgs < 0:
            raise UserError(f"--report_ecgs must be at least 0, not {self.report_ecgs}")
        if not all(map(math.isfinite, self.noise_db)) or len(set(self.noise_db)) < len(self.noise_db):
            raise UserError(f"--noise_db: must be different numbers of dB, not {' '.join(map(str, self.noise_db))}")


def main() -> None:
    args = parse(EvaluateArguments, __doc__)
    started = time.time()
    (shards,), _ = open_shards(args, [args.split], "tasks")
    stamp, cache = remembered(args.model), {"cache": args.shard_cache, "cache_gb": args.shard_cache_gb}
    looked, leaks = check_leak(shards, args.train_shards, stamp.get("trained_on", []), args.on_leak == "warn", **cache)
    notes = list(leaks)
    if stamp.get("chosen_on") == args.split:
        notes.append(f"The adapter was chosen among several by its answers to the {args.split} split, so these figures flatter it.")
    asked = survey(shards)
    baseline, known = blind.of_shards([args.shards, *looked], **cache)
    classes = read_classes(args.classes) if args.classes else baseline["classes"] if baseline else None
    if args.answers == "constrained":
        check_classes(asked, classes)
    model, tokenizer, vocabulary, prompts, adapter = load_trained(args.model, shards.index, torch.bfloat16 if wants_bf16(args) else torch.float32)
    ecg_tokenizer = tokenizer_of(shards)
    features = ECGFeatures(ecg_tokenizer, adapter.mean, adapter.std) if adapter else None
    inputs = Inputs(shards, ecg_tokenizer, features, other_patients([one.patients for one in asked], [one.n_ecgs for one in asked], args.seed), args.seed)
    if args.noise_db:
        inputs.of(args.noise_db[0], 0)  # that the recordings are at hand
    ranks, folder = start(), run_folder(args.output_dir)  # before the hours of generation, not after
    made = {name: value for name, value in as_record(args).items() if name not in FREE} | {
        "precision": str(model.dtype).removeprefix("torch."), "shards digest": shards.digest, "model digest": model_digest(args.model, model),
        "classes digest": args.classes and digest(args.classes), "majority answers": blind.digest_of(baseline),
    }  # fmt: skip
    check_same(folder, made)
    # what may change of a complete one is written again: without an answer more
    leak = " ".join(leaks) or f"no patient is in the training shards ({', '.join(map(short, looked))})"
    drawn = spaced(len(shards), args.report_ecgs or len(shards))
    if (folder / METRICS).is_file() and {"leak check": leak, "drawn ECGs": len(drawn)}.items() <= json.loads((folder / METRICS).read_text())["run"].items():
        if ranks.main:
            print(f"{folder} is complete already")
        return
    dist.barrier()  # no rank may look after rank 0 has begun to write
    if ranks.main:
        write_text(folder / MADE, json.dumps(made, indent=2))
        print("\n".join(leaks or [f"no patient of {args.split} is in the training shards ({', '.join(looked)})"]), flush=True)
    for module in (model, adapter) if adapter else (model,):
        module.to(ranks.device)
    say = speaker((model, tokenizer, vocabulary, prompts), ranks.device, adapter, classes if args.answers == "constrained" else None)
    kinds, numbers = kinds_of(args.controls, args.noise_db), ordinals([one.patients[0] for one in asked])

    def answer(batch: Sequence[int]) -> list[dict]:
        return predict(batch, inputs, kinds, say, args.max_new_tokens, baseline, numbers)

    rows = answer_all(folder, asked, args.per_device_eval_batch_size, answer, ranks)
    if ranks.main:
        write_rows(folder / PREDICTIONS, rows)
        metrics = table(rows, classes)
        cut = sum(row.get("cut", False) for row in rows)
        notes += [f"{cut} of {len(rows)} answers were cut at --max_new_tokens {args.max_new_tokens}, or at the model's context."] if cut else []
        strange = sum(row["task"] == "ecgqa" and row["template_id"] not in baseline["classes"] for row in rows) if baseline else 0
        notes += [f"{strange} questions are of templates that {known} has not: their majority answer is that of others."] if strange else []
        metrics["notes"] += notes
        metrics["run"] = {
            "model": args.model, "shards": args.shards, "split": args.split, "ECGs": len(shards), "patients": len(numbers), "tasks": len(rows),
            "answers": args.answers, "precision": made["precision"], "seed": args.seed, "majority answers of": known, "leak check": leak,
            "drawn ECGs": len(drawn),
        }  # fmt: skip
        metrics["made"] = made
        write_report(folder / "report.html", metrics, rows, ecgs(shards, drawn, ecg_tokenizer), metrics["run"])
        write_text(folder / METRICS, json.dumps(metrics, indent=2))  # last: it says that all is there
        print(text_table(metrics))
        print(f"{time.time() - started:.0f} s on {ranks.world} rank(s); report: {(folder / 'report.html').resolve()}")


if __name__ == "__main__":
    launcher(main)()

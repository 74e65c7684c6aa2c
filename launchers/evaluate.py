"""Answer every task of a split and judge the answers, beside a baseline that never sees the ECG.

deepspeed launchers/evaluate.py --model runs/demo/instruct --shards runs/demo/tasks --split test --output_dir runs/demo/evaluate

Writes metrics.json, predictions.jsonl (one line a task) and report.html. The split is spread over the ranks; every task is answered once.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from tqdm import tqdm

from sharding.manifest import read_manifest
from toolkit.errors import UserError
from toolkit.evaluation import blind, metrics
from toolkit.evaluation.cards import card, tokenizer_of
from toolkit.evaluation.generate import answer_tasks
from toolkit.evaluation.html_report import write_report
from toolkit.files import run_folder, write_text
from toolkit.lm.continuous import ECGAdapter
from toolkit.lm.trained import load_trained
from toolkit.shards.reader import Shards
from toolkit.tasks.prompts import Prompts, reference_text
from toolkit.tasks.vocabulary import ECGVocabulary
from toolkit.tokenizer.features import ECGFeatures
from toolkit.tokenizer.tokenizer import ECGTokenizer
from toolkit.training.arguments import LaunchArguments, arg, as_record, parse
from toolkit.training.distributed import Ranks, bf16_is_fast, launcher, start
from toolkit.training.shards import ShardArguments, open_shards

CARDS = 12  # ECGs drawn in the report
SHOWN = ("BLEU-1", "bleu_1"), ("BLEU-4", "bleu_4"), ("ROUGE-L", "rouge_l")
KEPT = ("id", "task", "question_type", "attribute_type", "template_id", "question")


@dataclass(kw_only=True)
class EvaluateArguments(ShardArguments, LaunchArguments):
    output_dir: str = arg("Folder of the results: metrics.json, predictions.jsonl, report.html. A folder that holds the same judgement is left as it is.")
    model: str = arg("Folder written by launchers/instruct.py (an adapter), launchers/pretrain.py or `python -m toolkit.lm.merge` (a model).")
    shards: str = arg("Task shards written by `python -m sharding.shard_tasks`: a folder, or the URL of one (s3://, gs://, https://, ...).")
    split: Literal["train", "valid", "test"] = arg("Split to judge. The blind baseline is always fitted on train.", "test")
    per_device_eval_batch_size: int = arg("ECGs (with all their questions) per rank and batch.", 8)
    max_new_tokens: int = arg("Longest answer or report.", 128)
    precision: Literal["auto", "bf16", "fp32"] = arg("auto: bf16 where the processor is fast at it, else fp32.", "auto")


def main() -> None:
    args = parse(EvaluateArguments, __doc__)
    started = time.time()
    (shards, train), _ = open_shards(args, [args.split, "train"], "tasks")
    dtype = torch.bfloat16 if args.precision == "bf16" or (args.precision == "auto" and bf16_is_fast()) else torch.float32
    model, tokenizer, vocabulary, prompts, adapter = load_trained(args.model, shards.index, dtype)
    ecg_tokenizer = tokenizer_of(shards)
    features = ECGFeatures(ecg_tokenizer, adapter.mean, adapter.std) if adapter else None
    ranks, folder = start(), run_folder(args.output_dir)  # before the hours of generation, not after
    made = {name: value for name, value in as_record(args).items() if name not in ("shard_cache", "shard_cache_gb")} | {"shards digest": shards.digest}
    if (folder / "metrics.json").is_file() and json.loads((folder / "metrics.json").read_text())["made"] == made:
        if ranks.main:
            print(f"{folder} is complete already")
        return
    baseline = blind.fit(task for i in range(len(train)) for task in train.meta(i)["tasks"])
    for module in (model, adapter) if adapter else (model,):
        module.to(ranks.device)
    rows = gather(predict(model, tokenizer, vocabulary, prompts, shards, baseline, args, ranks, features, adapter), ranks)
    if ranks.main:
        write_text(folder / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        scores = judge(rows, patients_of(rows, shards))
        info = {
            "model": args.model, "shards": args.shards, "split": args.split, "ECGs": len(shards), "tasks": len(rows),
            "ranks": ranks.world, "seconds": round(time.time() - started, 1),
        }  # fmt: skip
        write_report(folder / "report.html", scores, cards(shards, rows, ecg_tokenizer), info)
        write_text(folder / "metrics.json", json.dumps({**scores, "run": info, "made": made}, indent=2))  # last: it says that all is there
        for line in summary(scores):
            print(line)
        if empty := sum(not row["prediction"].strip() for row in rows):
            print(f"{empty} of {len(rows)} answers are empty: they count as wrong")
        print(f"report: {(folder / 'report.html').resolve()}")


def predict(
    model,
    tokenizer,
    vocabulary: ECGVocabulary,
    prompts: Prompts,
    shards: Shards,
    baseline: dict,
    args: EvaluateArguments,
    ranks: Ranks,
    features: ECGFeatures | None = None,
    adapter: ECGAdapter | None = None,
) -> list[dict]:
    """This rank's rows of predictions.jsonl, each with the place of its sample. features, adapter: of a model that reads continuous ECGs."""
    rows = []
    # by number of ECGs, because those of a batch must be of one length
    mine = sorted(range(ranks.rank, len(shards), ranks.world), key=lambda i: (int(shards.rows[i]["n_ecgs"]), i))
    bar = tqdm(total=len(mine), desc="evaluate", unit="ECG", disable=None if ranks.main else True)
    while mine:
        n_ecgs = shards.rows[mine[0]]["n_ecgs"]
        batch = [i for i in mine[: args.per_device_eval_batch_size] if shards.rows[i]["n_ecgs"] == n_ecgs]
        mine = mine[len(batch) :]
        metas = [shards.meta(i) for i in batch]
        samples = [(shards.ids(i), meta, meta["tasks"]) for i, meta in zip(batch, metas)]
        for codes, meta, _ in samples if features else ():
            meta["features"] = features.of(shards, codes, meta)
        given = answer_tasks(model, tokenizer, vocabulary, prompts, samples, args.max_new_tokens, ranks.device, adapter)
        for i, (_, _, tasks), answers in zip(batch, samples, given):
            for task, answer in zip(tasks, answers):
                known = {name: task[name] for name in KEPT if name in task}
                rows.append({**known, "sample": i, "prediction": answer, "reference": reference_text(task), "blind": blind.predict(baseline, task)})
        bar.update(len(batch))
    bar.close()
    return rows


def gather(rows: list[dict], ranks: Ranks) -> list[dict]:
    """All ranks' rows on rank 0, in the order of the shards, whatever the number of ranks; an empty list elsewhere."""
    parts = [None] * ranks.world if ranks.main else None
    dist.gather_object(rows, parts)
    return sorted((row for part in parts for row in part), key=lambda row: row["sample"]) if ranks.main else []


def patients_of(rows: list[dict], shards: Shards) -> list[str]:
    """The patient (a pseudonym) of each row, of two ECGs the first one's. Only for `judge`: no file of the results names patients."""
    first = {i: shards.meta(i)["patients"][0] for i in {row["sample"] for row in rows}}
    return [first[row["sample"]] for row in rows]


def judge(rows: list[dict], patients: list[str]) -> dict:
    """metrics.json: exact match and report scores, of the model and of the blind baseline, and how sure their difference is. patients: [len(rows)]."""
    blind_rows = [{**row, "prediction": row["blind"]} for row in rows]
    return {
        "exact_match": metrics.exact_match(rows),
        "report": metrics.report_scores(rows),
        "blind": {"exact_match": metrics.exact_match(blind_rows), "report": metrics.report_scores(blind_rows)},
        "over_blind": metrics.over_blind(rows, patients),
        "counts": metrics.question_counts(rows),
        "conventions": {
            "exact_match": metrics.EXACT_MATCH_CONVENTION, "over_blind": metrics.OVER_BLIND_CONVENTION, "report": metrics.REPORT_CONVENTION,
        },
    }  # fmt: skip


def summary(scores: dict) -> list[str]:
    """A line for each question type that was asked: exact match, the blind baseline's, and the difference with its 95 % interval over patients; and of
    reports three scores and the baseline's."""
    lines = []
    for kind, over in scores["over_blind"].items():
        if over["n"]:
            model, blind_too = (f"{100 * judged['exact_match'][kind]:5.1f} %" for judged in (scores, scores["blind"]))
            difference, *interval = (f"{round(100 * over[name], 1) + 0.0:+.1f}" for name in ("difference", "low", "high") if over[name] is not None)
            between = f" ({' to '.join(interval)})" if interval else ""
            lines.append(f"{kind:>28}: exact match {model}   blind {blind_too}   difference {difference}{between}")
    if scores["report"]["n"]:
        said = (f"{name} {100 * scores['report'][key]:5.1f} (blind {100 * scores['blind']['report'][key]:.1f})" for name, key in SHOWN)
        lines.append(f"{'reports':>28}: {'   '.join(said)}")
    return lines


def cards(shards: Shards, rows: list[dict], tokenizer: ECGTokenizer) -> list[dict]:
    """A dozen ECGs evenly spaced over the split, so that the choice flatters nobody."""
    try:
        manifest = read_manifest(shards.folder / shards.index["manifest"])
        recordings = dict(zip(manifest["record_id"], zip(manifest["path"], manifest["start"], manifest["array"])))
    except UserError:  # the shards were moved without their manifest: the report draws reconstructions alone
        recordings = {}
    chosen = sorted({i * len(shards) // CARDS for i in range(CARDS)})
    return [card(shards, i, [row for row in rows if row["sample"] == i], recordings, tokenizer) for i in chosen]


if __name__ == "__main__":
    launcher(main)()

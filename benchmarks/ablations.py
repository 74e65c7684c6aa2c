"""What each part of the method brings, on real ECGs: pretraining, its objective, discretisation, the order of the prompt; three seeds each.

    python benchmarks/ablations.py                                   # two hours on two cores beside other programs; run again, it goes on where it stopped
    python benchmarks/ablations.py --seeds 1 --variants reference without-pretraining
    python benchmarks/ablations.py --out runs/ablations              # complete: prints the table alone

PTB-XL (part) and the questions derived from its labels in ../shared/data: folds 1-8 to train, fold 9 to judge. Every run is a launcher with a recipe of
recipes/ablations/, `tiny` on one rank, and as many of them run at a time as there are cores: on two, 1.5 times the ECGs a second of two ranks. The tokenizer
and the shards are the same for all, trained on folds 1-8 alone. The same seed gives the model the same first weights, the same words and the same order of
the data in all variants. `tiny` never saw text: it learns its words from the reports in pretraining and in tuning.

The score of a question is the mean over seeds of its exact match; intervals are 95 %, over patients (toolkit/evaluation/statistics.py). They speak of other
patients, not of other seeds: the lowest and highest seed stand beside them.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder has a sharding.py and a tokenizer.py too

from benchmarks.turns import ROOT, launch
from toolkit.evaluation.blind import fit, predict
from toolkit.evaluation.metrics import is_correct
from toolkit.evaluation.scores import mean_score
from toolkit.evaluation.statistics import difference, estimate
from toolkit.shards.reader import Shards
from toolkit.tasks.prompts import reference_text

REAL = Path(os.environ.get("ECG_DATA", ROOT.parent / "shared" / "data"))
RECIPES = ROOT / "recipes" / "ablations"
VARIANTS = {  # name -> (recipe of pretraining, recipe of tuning, what it is compared with)
    "reference": ("pretrain-causal", "reference", None),
    "windows": ("pretrain-windows", "reference", "reference"),
    "without-pretraining": ("pretrain-none", "reference", "reference"),
    "without-discretisation": ("pretrain-causal", "without-discretisation", "reference"),
    "one-question": ("pretrain-causal", "one-question", "reference"),
    "paper-prompt": ("pretrain-causal", "paper-prompt", "one-question"),
}
KINDS = ("all", "single-verify", "single-choose", "single-query")
SPLIT = "valid"  # fold 9


def prepare(out: Path) -> None:
    """Manifest, tokenizer, token shards and task shards; what is complete is left as it is."""
    zero = ["--deepspeed", "ds_configs/zero1.json"]
    module("sharding.prepare", "ptbxl", "--root", REAL / "ptbxl", "--out", out / "manifest")
    launch(["launchers/train_tokenizer.py", *zero, "--manifest", out / "manifest", "--output_dir", out / "tokenizer", "--max_steps", 1000,
            "--per_device_train_batch_size", 8])  # fmt: skip
    module("sharding.shard", "--manifest", out / "manifest", "--tokenizer", out / "tokenizer", "--out", out / "shards")
    module("sharding.shard_tasks", "ecgqa", "--qa", REAL / "ecgqa" / "ptbxl" / "derived", "--shards", out / "shards", "--out", out / "tasks")


def pretrain(out: Path, recipe: str, seed: int) -> None:
    """A backbone; variants of the same recipe share it."""
    backbone = out / f"{recipe}-{seed}"
    if not (backbone / "train_results.json").is_file():
        launch(["launchers/pretrain.py", "--recipe", RECIPES / f"{recipe}.yaml", "--seed", seed, "--shards", out / "shards", "--output_dir", backbone], ranks=1)


def tune(out: Path, variant: str, seed: int) -> None:
    """Tuning and judgement of one variant."""
    recipe, tuning, _ = VARIANTS[variant]
    tuned = out / f"{variant}-{seed}"
    if not (tuned / "train_results.json").is_file():
        launch(["launchers/instruct.py", "--recipe", RECIPES / f"{tuning}.yaml", "--seed", seed, "--backbone", out / f"{recipe}-{seed}",
                "--shards", out / "tasks", "--output_dir", tuned], ranks=1)  # fmt: skip
    if not (tuned / "judged" / "metrics.json").is_file():
        launch(["launchers/evaluate.py", "--model", tuned, "--shards", out / "tasks", "--split", SPLIT, "--output_dir", tuned / "judged",
                "--max_new_tokens", 24, "--controls", "words"], ranks=1)  # fmt: skip


def at_once(what: str, run, jobs: list[tuple], workers: int) -> None:
    """run(*job) for all jobs, `workers` at a time; the first that fails ends it."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run, *job) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), what, len(jobs), unit="run"):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def module(name: str, *words) -> None:
    subprocess.run([sys.executable, "-m", name, *map(str, words)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def scored(judged: Path, ids: list[str]) -> list[bool]:
    """Which questions a run of launchers/evaluate.py found answered exactly."""
    right = {row["id"]: is_correct(row) for row in map(json.loads, (judged / "predictions.jsonl").read_text().splitlines())}
    return [right[id] for id in ids]


def majority(train: list[dict], tasks: list[dict], attributes: bool) -> np.ndarray:
    """Exact match float [n] of the most frequent answer of the training split, for the same template, and attributes."""
    baseline = fit(train)
    return np.array([is_correct({"prediction": predict(baseline, task, attributes), "reference": reference_text(task)}) for task in tasks], float)


def table(out: Path, variants: list[str], seeds: list[int], beside: list[Path]) -> str:
    """Markdown: exact match of each variant and kind of question with its interval and its lowest and highest seed; and the difference to what the variant
    is compared with. beside: folders of more judgements."""
    shards, train = (Shards.open(out / "tasks", split) for split in (SPLIT, "train"))
    metas = [shards.meta(i) for i in range(len(shards))]
    tasks = [(task, meta["patients"][0]) for meta in metas for task in meta["tasks"]]
    patients = np.array([patient for _, patient in tasks])
    kind_of = np.array([task["question_type"] for task, _ in tasks])
    chosen = {kind: np.flatnonzero((kind_of == kind) | (kind == "all")) for kind in KINDS}
    asked, known = [task for task, _ in tasks], [task for i in range(len(train)) for task in train.meta(i)["tasks"]]
    blind, template = majority(known, asked, True), majority(known, asked, False)
    ids = [task["id"] for task in asked]
    found = {variant: np.array([scored(out / f"{variant}-{seed}" / "judged", ids) for seed in seeds], float) for variant in variants}
    lines = [f"| exact match, {len(seeds)} seeds | {' | '.join(KINDS)} |", "|---" * (1 + len(KINDS)) + "|"]

    def row(name: str, one: np.ndarray, other: np.ndarray | None = None, more=lambda at: "") -> None:
        """one, other: a score for each question."""
        cells = []
        for at in chosen.values():
            scores = [mean_score("exact_match", "Exact match", at, each[at]) for each in (one, other) if each is not None]
            mean, low, high = (100 * value for value in (estimate if other is None else difference)(*scores, patients))
            sign = "" if other is None else "+"
            cells.append(f"{mean:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f}){more(at)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")

    row("majority answer per template", template)
    row("blind: majority answer per template and attributes asked for", blind)
    for variant, each in found.items():
        row(variant, each.mean(0), more=lambda at, each=each: "; {:.1f} to {:.1f}".format(*(100 * f(each[:, at].mean(1)) for f in (np.min, np.max))))
    for variant, each in found.items():
        other = VARIANTS[variant][2]
        if other is None or other in found:
            row(f"{variant} over {other or 'blind'}", each.mean(0), blind if other is None else found[other].mean(0))
    for folder in beside:
        right = np.array(scored(folder, ids), float)
        row(str(folder), right)
        row(f"{folder} over majority per template", right, template)
        row(f"{folder} over blind", right, blind)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "ablations", help="folder of all runs (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="(default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one a core, %(default)s)")
    parser.add_argument("--beside", type=Path, nargs="+", default=[], help="results of launchers/evaluate.py on the same questions, for the table")
    args = parser.parse_args()
    if not (REAL / "ptbxl").is_dir():
        parser.error(f"{REAL} has no ptbxl/: set ECG_DATA to the folder of real ECGs")
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    prepare(out)
    recipes = dict.fromkeys(VARIANTS[variant][0] for variant in args.variants)
    at_once("pretraining", pretrain, [(out, recipe, seed) for seed in args.seeds for recipe in recipes], args.jobs)
    at_once("tuning", tune, [(out, variant, seed) for seed in args.seeds for variant in args.variants], args.jobs)
    text = table(out, args.variants, args.seeds, args.beside)
    (out / "table.md").write_text(text + "\n")
    print(f"\n{text}")


if __name__ == "__main__":
    main()

"""What it brings that all questions of an ECG share its one pass through the model: pairs of ECG and question per second beside padded batches of pairs.

    python benchmarks/instruct.py                                 # about a quarter of an hour on two cores, no GPU
    python benchmarks/instruct.py --cases synthetic --rounds 1 --steps 1      # does it run?
    python benchmarks/instruct.py --json instruct.json

synthetic: 23 questions for each ECG, as many as ECG-QA has for an ECG of PTB-XL; of the synthetic corpus, whose every question is answered and 23 drawn.
derived: the questions of ../shared/data/ecgqa/ptbxl/derived, nine an ECG but unevenly; left out where that folder is absent.

Ours is the real loop over real task shards, a micro-batch of ECGS ECGs with all their questions per rank. Theirs is transformers.Trainer with a PEFT model:
every pair is a sample of its own, ECG, question and answer, tokenised in memory, shuffled and padded to the longest of the batch. Same backbone (`tiny`),
LoRA, ECGs, questions, precision and DeepSpeed configuration (ds_configs/zero2.json), as many pairs per step; before training the summed loss of the same
pairs must be the same. The Trainer may cut its step into micro-batches: each of SPLITS is measured, and the one that is fastest for it once more with
group_by_length. Two ranks of one thread each; both sides take turns as in benchmarks/pretrain.py; medians over rounds, after one to warm up.
"""

import argparse
import copy
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder has a sharding.py and a tokenizer.py too

from benchmarks.turns import (
    HEADER,
    RANKS,
    ROOT,
    SEED,
    Turns,
    compared,
    launch,
    line,
    machine,
    make_shards,
    run_module,
    synthetic_ecgs,
    words_of,
    worker_arguments,
)

REAL = ROOT.parent / "shared" / "data"
RECORDS, QUESTIONS = 100, 23  # of the synthetic corpus, an ECG
ECGS = 4  # per rank and step
SPLITS = 1, 2, 4  # micro-batches that the Trainer cuts a step into
LORA = 16, 16, 0.0  # rank, alpha, dropout: the defaults of launchers/instruct.py
SAME = {True: 1e-3, False: 1e-5}  # bf16 or not: how far the two sides' losses may differ


def worker(args: argparse.Namespace) -> None:
    """One case on one rank: the real loop in this thread, the Trainer in another."""
    import torch

    from benchmarks import baselines
    from launchers.instruct import InstructArguments
    from toolkit.lm.backbone import load_backbone
    from toolkit.lm.flops import row_flops
    from toolkit.lm.lora import add_lora
    from toolkit.lm.model import PackedLM
    from toolkit.lm.vocabulary import extend
    from toolkit.shards.reader import Shards
    from toolkit.tasks.corpus import corpus
    from toolkit.tasks.instruct import TaskData
    from toolkit.tasks.prompts import Prompts
    from toolkit.training.arguments import parse
    from toolkit.training.distributed import bf16_is_fast, start
    from toolkit.training.loop import Job, train

    split, grouped = int(args.case.split()[0]), "grouped" in args.case
    tokens, shards = (Shards.open(args.work / kind, "train", kind=kind_of) for kind, kind_of in (("shards", "tokens"), ("tasks", "tasks")))
    ranks, bf16 = start(), bf16_is_fast()

    def model():
        lm, tokenizer = load_backbone("tiny", lambda: corpus(tokens), SEED)
        vocabulary = extend(lm, tokenizer, shards.index["levels"], SEED, knows_text=True)
        torch.manual_seed(SEED)
        return add_lora(lm, *LORA), tokenizer, vocabulary

    (lm, tokenizer, vocabulary), (other, *_) = model(), model()
    other.config.use_cache = False
    data = TaskData([shards], tokenizer, vocabulary, Prompts(), SEED)
    steps = (args.rounds + 1) * args.steps
    words = {"deepspeed": ROOT / "ds_configs" / "zero2.json", "backbone": "tiny", "shards": args.work / "tasks", "output_dir": args.work / "ours" / args.case,
             "per_device_train_batch_size": ECGS, "max_steps": steps + 1, "save_steps": 10**9, "learning_rate": 1e-3, "seed": SEED}  # fmt: skip
    ours = parse(InstructArguments, "", words_of(words))
    rows = [data.batch([data.at(SEED, position)]).inputs for position in range(steps * ECGS * RANKS)]  # the ECGs that the loop will see
    samples = [sample for row in rows for sample in baselines.padded_samples(row)]
    size = len(samples) // (steps * RANKS * split)
    agree(lm, other, rows[0], baselines.collator(tokenizer.pad_token_id)(samples[: pairs_of(rows[0])]), bf16)

    turns = Turns(args.rounds)
    loss = turns.counted(lambda engine, row: engine(row), pairs_of, args.steps)
    turns.side_thread(
        lambda: baselines.hf_trainer(
            args, turns, other, samples, size, tokenizer.pad_token_id, grouped, bf16, lambda batch: len(batch["input_ids"]), accumulation=split
        )
    )
    flops, hidden_size, nothing = row_flops(lm), lm.config.hidden_size, lambda *_: {"eval_loss": 0.0}
    train(ours, Job(PackedLM(lm), data, loss, nothing, nothing, {}, flops=flops, hidden_size=hidden_size), ranks, args.case)
    rates = {side: turns.rates(side) for side in ("ours", "theirs")}
    if ranks.main:
        per_pair = {"ours": sum(len(row.input_ids) for row in rows) / len(samples), "theirs": sum(len(s["input_ids"]) for s in samples) / len(samples)}
        found = {**rates, "step_seconds": median(turns.seconds["ours"][1:]) / args.steps, "bf16": bf16, "size": size, "tokens_per_pair": per_pair,
                 "pairs_per_ecg": len(samples) / len(rows)}  # fmt: skip
        (args.work / "result.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # the other engine's threads and handles need no farewell


def pairs_of(row) -> int:
    return sum(len(branches) for _, _, branches in row.layout)


def agree(ours, theirs, row, batch: dict, bf16: bool) -> None:
    """Both sides' summed loss over the pairs of an ECG, in the precision of the run. Raises AssertionError if they differ."""
    import torch

    from toolkit.lm.model import PackedLM

    dtype = torch.bfloat16 if bf16 else torch.float32
    ours, theirs = (copy.deepcopy(lm).to(dtype) for lm in (ours, theirs))
    with torch.no_grad():
        a, b = PackedLM(ours)(row).item(), theirs(**batch).loss.item() * len(row.targets)
    assert abs(a - b) < SAME[bf16] * b, f"the summed loss of {len(row.targets)} targets is {a} here and {b} there"


def compare(case: str, split: int, grouped: bool, args: argparse.Namespace) -> dict:
    """A case in two ranks of one thread each, with the Trainer's step cut into `split` micro-batches."""
    rounds = 3 if grouped else args.rounds  # with the one to warm up four: transformers sorts each quarter of a small data set by length
    result = args.work / case / "result.json"
    result.unlink(missing_ok=True)
    words = ["--case", f"{split}{' grouped' if grouped else ''}", "--work", args.work / case, "--rounds", rounds, "--steps", args.steps]
    launch([Path(__file__), "worker", *words])
    found = json.loads(result.read_text())
    baseline = f"HF Trainer + PEFT, {found['size']} padded pairs a batch{', group_by_length' if grouped else ''}"
    what = f"pairs/s, {found['pairs_per_ecg']:.1f} questions an ECG"
    return {**compared(what, baseline, found), "case": case, "size": found["size"], "grouped": grouped, "tokens_per_pair": found["tokens_per_pair"]}


def measured(case: str, args: argparse.Namespace) -> list[dict]:
    """Every split, and the fastest for the Trainer once more with group_by_length; prints each."""
    results = []
    for split in SPLITS:
        results.append(compare(case, split, False, args))
        print(line(results[-1]), flush=True)
    fastest = SPLITS[min(range(len(SPLITS)), key=lambda k: results[k]["ratio"])]
    results.append(compare(case, fastest, True, args))
    print(line(results[-1]), flush=True)
    best = min(results, key=lambda result: result["ratio"])
    tokens = {side: best["tokens_per_pair"][side] * best[key] for side, key in (("ours", "ours"), ("theirs", "baseline_per_s"))}
    print(
        f"  {best['ratio']:.2f}x of the fastest, {best['baseline']}; a pair is {best['tokens_per_pair']['ours']:.0f} tokens here and"
        f" {best['tokens_per_pair']['theirs']:.0f} there, {tokens['ours']:,.0f} and {tokens['theirs']:,.0f} tokens/s without padding", flush=True
    )  # fmt: skip
    return results


def make_tasks(case: str, work: Path) -> None:
    """Token shards and task shards of a case."""
    real = case == "derived"
    make_shards(work, REAL / "ptbxl" if real else synthetic_ecgs(work, RECORDS))
    if not real:
        (work / "qa").mkdir()
        (work / "qa" / "questions.json").write_text(json.dumps(synthetic_questions()))
    questions = REAL / "ecgqa" / "ptbxl" / "derived" if real else work / "qa"
    run_module("sharding.shard_tasks", "ecgqa", "--qa", questions, "--shards", work / "shards", "--out", work / "tasks")


def synthetic_questions() -> list[dict]:
    """QUESTIONS rows of ECG-QA for each ECG of the synthetic corpus, drawn from all that can be asked of it and answered truly."""
    import numpy as np

    from toolkit.ecg.heart import draw
    from toolkit.ecg.synthetic_text import QUESTIONS as EVERY
    from toolkit.ecg.synthetic_text import answer, facts

    rows = []
    for ecg_id in range(1, RECORDS + 1):
        generator = np.random.default_rng([SEED, ecg_id])  # as the corpus draws this ECG's heart
        true = facts(draw(generator))
        possible = [question for question in EVERY if question[0][3] in true]
        for k in generator.permutation(len(possible))[:QUESTIONS]:
            (template, kind, attribute_type, family, _, wording), group, _ = possible[k]
            rows.append({"template_id": template, "sample_id": len(rows), "question_type": f"single-{kind}", "attribute_type": attribute_type,
                         "question": wording.format(*group) if kind != "query" else wording, "answer": list(answer(kind, group, true[family])),
                         "ecg_id": [ecg_id], "attribute": list(group)})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["worker"], help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="+", default=["synthetic", "derived"], choices=["synthetic", "derived"], help="what to measure (default: both)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side beside the one to warm up (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a round (default: %(default)s)")
    worker_arguments(parser)
    args = parser.parse_args()
    if args.part:
        return worker(args)
    print(machine(), flush=True)
    if "derived" in args.cases and not REAL.is_dir():
        print("../shared/data is not there: synthetic questions alone", flush=True)
        args.cases = ["synthetic"]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        args.work = Path(folder)
        print(HEADER, flush=True)
        for case in args.cases:
            make_tasks(case, args.work / case)
            results += measured(case, args)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

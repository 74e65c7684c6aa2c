"""What a step of pretraining costs beside the published step and the Hugging Face Trainer; and what loading and checkpoints cost of a launched run.

    python benchmarks/pretrain.py all                     # about ten minutes on two cores, no GPU
    python benchmarks/pretrain.py published               # supervised tokens/s against the published step
    python benchmarks/pretrain.py trainer stalls          # tokens/s against transformers.Trainer; data wait and checkpoints of a run
    python benchmarks/pretrain.py all --rounds 1 --steps 1     # does it run?
    python benchmarks/pretrain.py all --json pretrain.json

Same model (`--backbone tiny`), same ECGs, same precision, same DeepSpeed configuration (ds_configs/zero2.json), two ranks of one thread each. Both sides
live in the same processes and take turns, a round each; the figures are medians over rounds, after one round to warm up. Ours is the real loop over
real shards. The Trainer gets its samples tokenised, in memory and padded to the longest of the batch; real tokens are counted, padding is not.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder has a sharding.py and a tokenizer.py too

from benchmarks.turns import HEADER, RANKS, ROOT, SEED, Turns, compared, launch, line, machine, make_shards, synthetic_ecgs, words_of, worker_arguments

ROWS, SEQ_LEN = 1, 4096  # rows of so many tokens per rank and step
CASES = {  # case -> (objective, report_targets, grouped by length)
    "causal": ("causal", "no", False),
    "reports": ("causal", "yes", False),
    "reports, grouped": ("causal", "yes", True),
    "windows": ("windows", "no", False),
    "windows, grouped": ("windows", "no", True),
}
GROUPED_ROUNDS = 3  # with the one to warm up four: transformers sorts each quarter of a small data set by length, so every round has all lengths


def worker(args: argparse.Namespace) -> None:
    """One case on one rank: the real loop in this thread, the baseline in another."""
    import torch

    from benchmarks import baselines
    from launchers.pretrain import PretrainArguments
    from toolkit.lm.backbone import load_backbone
    from toolkit.lm.flops import row_flops
    from toolkit.lm.model import PackedLM
    from toolkit.lm.vocabulary import extend
    from toolkit.shards.reader import Shards
    from toolkit.tasks.data import ForecastData
    from toolkit.training.arguments import parse
    from toolkit.training.distributed import bf16_is_fast, start
    from toolkit.training.loop import Job, train

    objective, reports, grouped = CASES.get(args.case, CASES["causal"])
    shards, ranks = Shards.open(args.work / "shards", "train", kind="tokens"), start()

    def model():
        lm, tokenizer = load_backbone("tiny", lambda: (shards.meta(i)["report"] for i in range(len(shards))), SEED)
        return lm, tokenizer, extend(lm, tokenizer, shards.index["levels"], SEED, knows_text=False)

    lm, tokenizer, vocabulary = model()
    data = ForecastData(shards, tokenizer, vocabulary, reports == "yes", objective=objective, seq_len=SEQ_LEN, seed=SEED)
    turns = Turns(args.rounds)
    per_rank = ROWS * data.samples_per_row
    ecgs = args.steps * per_rank * RANKS  # of a round, on either side
    words = {"deepspeed": ROOT / "ds_configs" / "zero2.json", "backbone": "tiny", "shards": args.work / "shards", "output_dir": args.work / "ours" / args.case,
             "per_device_train_batch_size": ROWS, "max_steps": (args.rounds + 1) * args.steps + 1, "save_steps": 10**9, "seq_len": SEQ_LEN,
             "objective": objective, "report_targets": reports}  # fmt: skip
    ours = parse(PretrainArguments, "", words_of(words))
    ours.learning_rate = 1e-3
    loss = turns.counted(lambda engine, row: engine(row), lambda row: len(row.targets if args.case == "published" else row.input_ids), args.steps)
    other, _, _ = model()
    if args.case == "published":
        turns.side_thread(lambda: baselines.published(args, turns, other, tokenizer, vocabulary, ecgs, bf16_is_fast()))
    else:
        rows = [data.batch([(0, i % len(data))]).inputs for i in range(ecgs * (args.rounds + 1))]
        samples = [sample for row in rows for sample in baselines.padded_samples(row)]
        size = len(samples) // ((args.rounds + 1) * args.steps * RANKS)
        turns.side_thread(lambda: baselines.hf_trainer(args, turns, other, samples, size, tokenizer.pad_token_id, grouped, bf16_is_fast()))
    flops, hidden_size = row_flops(lm), lm.config.hidden_size
    nothing = lambda *_: {"eval_loss": 0.0}
    job = Job(model=PackedLM(lm), data=data, loss=loss, evaluate=nothing, export=nothing, identity={}, flops=flops, hidden_size=hidden_size)
    train(ours, job, ranks, args.case)
    rates = {side: turns.rates(side) for side in ("ours", "theirs")}
    if ranks.main:
        step = median(turns.seconds["ours"][1:]) / args.steps
        (args.work / "result.json").write_text(json.dumps({**rates, "step_seconds": step, "bf16": bf16_is_fast(), "ecgs": ecgs}))
    torch.distributed.barrier()
    os._exit(0)  # the other engine's threads and handles need no farewell


def stalls(args: argparse.Namespace) -> list[dict]:
    """Data wait and checkpoints, as the log of a launched run has them."""
    out, steps = args.work / "stalls", 10 * max(2, args.steps)
    shutil.rmtree(out, ignore_errors=True)
    launch([ROOT / "launchers/pretrain.py", "--deepspeed", ROOT / "ds_configs/zero2.json", "--backbone", "tiny", "--shards", args.work / "shards",
            "--output_dir", out, "--max_steps", steps, "--save_steps", steps // 2, "--logging_steps", max(1, steps // 10), "--max_eval_samples", 8,
            "--per_device_train_batch_size", ROWS, "--seq_len", SEQ_LEN])  # fmt: skip
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    speed, saves = [line for line in lines if "data_wait" in line], [line["save_seconds"] for line in lines if "save_seconds" in line]
    step = median(line["step_seconds"] for line in speed[1:])
    share = 100 * median(saves) / (median(saves) + 500 * step)  # --save_steps 500, the default
    return [
        {"what": "data wait, share of the step", "value": 100 * median(line["data_wait"] for line in speed[1:]), "unit": "%"},
        {"what": "checkpoint stall", "value": median(saves), "unit": "s"},
        {"what": "checkpoint stall, share with --save_steps 500", "value": share, "unit": "%"},
        {"what": "tokens/s of the launched run, by its log", "value": median(line["tokens_per_second"] for line in speed[1:]), "unit": "1/s"},
    ]


def compare(case: str, args: argparse.Namespace) -> list[dict]:
    """A case in two ranks of one thread each."""
    rounds = GROUPED_ROUNDS if case.endswith("grouped") else args.rounds
    result = args.work / "result.json"
    result.unlink(missing_ok=True)
    launch([Path(__file__), "worker", "--case", case, "--work", args.work, "--rounds", rounds, "--steps", args.steps])
    found = json.loads(result.read_text())
    baseline = "published step" if case == "published" else "HF Trainer, padded" + (", group_by_length" if case.endswith("grouped") else "")
    return [compared(f"{'supervised ' if case == 'published' else ''}tokens/s, {case}", baseline, found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["published", "trainer", "stalls", "all", "worker"], help="what to measure (worker: used by itself)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side beside the one to warm up (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a round (default: %(default)s)")
    parser.add_argument("--records", type=int, default=400, help="synthetic records (default: %(default)s)")
    worker_arguments(parser)
    args = parser.parse_args()
    if args.parts == ["worker"]:
        return worker(args)
    print(machine(), flush=True)
    parts = ["published", "trainer", "stalls"] if "all" in args.parts else args.parts
    results = []
    with tempfile.TemporaryDirectory() as folder:
        args.work = Path(folder)
        make_shards(args.work, synthetic_ecgs(args.work, args.records))
        print(HEADER, flush=True)
        for part in parts:
            for case in {"published": ["published"], "trainer": CASES, "stalls": [None]}[part]:
                for result in stalls(args) if case is None else compare(case, args):
                    results.append(result)
                    print(line(result), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

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
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # this folder has a sharding.py and a tokenizer.py too

RANKS, SEED, ROWS = 2, 0, 1  # ROWS of --seq_len tokens per rank and step
SEQ_LEN = 4096
CASES = {  # case -> (objective, report_targets, grouped by length)
    "causal": ("causal", "no", False),
    "reports": ("causal", "yes", False),
    "reports, grouped": ("causal", "yes", True),
    "windows": ("windows", "no", False),
    "windows, grouped": ("windows", "no", True),
}
GROUPED_ROUNDS = 3  # with the one to warm up four: transformers sorts each quarter of a small data set by length, so every round has all lengths


class Turns:
    """Two training loops in one process take turns: the main thread ("ours") first, "theirs" in a thread of its own.

    A loop calls `over(side, tokens)` at the end of each of its rounds and gets the seconds of the round written down.
    """

    def __init__(self, rounds: int):
        self.rounds, self.error = rounds, None
        self.tokens, self.seconds = {"ours": [], "theirs": []}, {"ours": [], "theirs": []}
        self.go = {"ours": threading.Semaphore(0), "theirs": threading.Semaphore(0)}

    def begin(self) -> None:
        self.started = time.perf_counter()

    def over(self, side: str, tokens: int) -> None:
        import torch.distributed as dist

        dist.barrier()  # the slower rank decides
        self.seconds[side].append(time.perf_counter() - self.started)
        self.tokens[side].append(tokens)
        self.hand_over(side)

    def hand_over(self, side: str) -> None:
        other = "theirs" if side == "ours" else "ours"
        self.go[other].release()
        self.go[side].acquire()
        if self.error:
            raise self.error
        self.begin()

    def side_thread(self, call: Callable[[], None]) -> None:
        """Start "theirs", which waits for its first turn."""

        def run():
            self.go["theirs"].acquire()
            try:
                self.begin()
                call()
            except BaseException as error:  # raised again in the main thread
                self.error = error
            self.go["ours"].release()

        threading.Thread(target=run, daemon=True).start()

    def rates(self, side: str) -> list[float]:
        """Tokens/s of each round but the first, over all ranks."""
        from toolkit.training.distributed import sum_over_ranks

        tokens = sum_over_ranks(self.tokens[side], "cpu")
        return [n / s for n, s in zip(tokens[1:], self.seconds[side][1:], strict=True)]


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
    ours = parse(PretrainArguments, "", [word for name, value in words.items() for word in (f"--{name}", str(value))])
    ours.learning_rate = 1e-3
    seen = [0, 0]  # micro-batches, tokens of the round

    def loss(engine, row):
        """Called at the start of each step: a round is from one call to another, and holds all that the loop does between."""
        if seen[0] == 0:
            turns.begin()
        elif seen[0] % args.steps == 0 and seen[0] <= (args.rounds + 1) * args.steps:
            turns.over("ours", seen[1])
            seen[1] = 0
        seen[0] += 1
        seen[1] += len(row.targets if args.case == "published" else row.input_ids)
        return engine(row)

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
    """A case in two ranks of one thread each: {"what", "ours", "baseline", "baseline_per_s", "ratio"}."""
    rounds = GROUPED_ROUNDS if case.endswith("grouped") else args.rounds
    result = args.work / "result.json"
    result.unlink(missing_ok=True)
    launch([Path(__file__), "worker", "--case", case, "--work", args.work, "--rounds", rounds, "--steps", args.steps])
    found = json.loads(result.read_text())
    each = [a / b for a, b in zip(found["ours"], found["theirs"], strict=True)]
    baseline = "published step" if case == "published" else "HF Trainer, padded" + (", group_by_length" if case.endswith("grouped") else "")
    return [{"what": f"{'supervised ' if case == 'published' else ''}tokens/s, {case}", "ours": median(found["ours"]), "baseline": baseline,
             "baseline_per_s": median(found["theirs"]), "ratio": median(found["ours"]) / median(found["theirs"]), "lowest": min(each), "highest": max(each),
             "step_seconds": found["step_seconds"], "precision": "bf16" if found["bf16"] else "fp32"}]  # fmt: skip


def launch(words: list) -> None:
    """Run a script on RANKS ranks through the deepspeed launcher; its output is shown only if it fails."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false",
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    command = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", RANKS, "--master_port", port, *words]
    done = subprocess.run(list(map(str, command)), env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-6000:]}\nfailed with exit code {done.returncode}: {' '.join(map(str, words))}")


def make_shards(work: Path, records: int) -> None:
    """Synthetic records, their manifest, an untrained tokenizer (ids need not be good to cost what they cost) and token shards."""
    from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig

    ECGTokenizer(TokenizerConfig()).save_pretrained(work / "tokenizer")
    for words in (
        ["toolkit.ecg.synthetic", "--out", work / "data", "--records", records, "--seed", SEED, "--workers", RANKS],
        ["sharding.prepare", "ptbxl", "--root", work / "data" / "ptbxl", "--out", work / "manifest"],
        ["sharding.shard", "--manifest", work / "manifest", "--tokenizer", work / "tokenizer", "--out", work / "shards"],
    ):
        subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def line(result: dict) -> str:
    if "ratio" not in result:
        return f"{result['what']:<48}{result['value']:>10,.3f} {result['unit']}"
    spread = f"({result['lowest']:.2f} to {result['highest']:.2f})"
    return f"{result['what']:<36}{result['ours']:>10,.0f}{result['baseline_per_s']:>10,.0f}{result['ratio']:>8.2f}x {spread:<18} of {result['baseline']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["published", "trainer", "stalls", "all", "worker"], help="what to measure (worker: used by itself)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side beside the one to warm up (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a round (default: %(default)s)")
    parser.add_argument("--records", type=int, default=400, help="synthetic records (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.parts == ["worker"]:
        return worker(args)
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} at the start", flush=True)
    parts = ["published", "trainer", "stalls"] if "all" in args.parts else args.parts
    results = []
    with tempfile.TemporaryDirectory() as folder:
        args.work = Path(folder)
        make_shards(args.work, args.records)
        print(f"{'':<36}{'ours':>10}{'baseline':>10}   ratio (rounds from, to)", flush=True)
        for part in parts:
            for case in {"published": ["published"], "trainer": CASES, "stalls": [None]}[part]:
                for result in stalls(args) if case is None else compare(case, args):
                    results.append(result)
                    print(line(result), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

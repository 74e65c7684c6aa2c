"""The whole line on the built-in synthetic corpus, on a machine without a GPU: data to a judged language model in under ten minutes.

python launchers/demo.py --out runs/demo        # what `make demo` runs
"""

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from toolkit.evaluation.table import text_table

RANKS = 2
COMPLETE = {  # stage -> the file it writes last
    "data": "corpus.json", "manifest": "prepare.json", "tokenizer": "train_results.json", "shards": "index.json", "tasks": "index.json",
    "pretrain": "train_results.json", "instruct": "train_results.json", "evaluate": "metrics.json",
}  # fmt: skip
# sized for ten minutes on two cores; everything not said here is the launchers' default
TOKENIZER = ["--max_steps", 90, "--per_device_train_batch_size", 8, "--max_eval_samples", 32]
PRETRAIN = ["--max_steps", 150, "--seq_len", 1500, "--max_eval_samples", 32]  # 4 ECGs a row
INSTRUCT = ["--max_steps", 290, "--per_device_train_batch_size", 3, "--tasks_per_ecg", 8, "--max_eval_samples", 32, "--max_eval_answers", 0]


def stages(out: Path) -> list[tuple[str, list, bool]]:
    """(name, command, through DeepSpeed) in the order they run; each writes out/<name> and leaves a complete one as it is."""
    data, manifest, tokenizer, shards, tasks, pretrain, instruct, evaluate = (out / name for name in COMPLETE)
    zero1, zero2 = (["--deepspeed", f"ds_configs/{name}"] for name in ("zero1.json", "zero2.json"))
    join = ["-m", "sharding.shard_tasks", "--shards", shards, "--out", tasks]
    return [
        ("data", ["-m", "toolkit.ecg.synthetic", "--out", data, "--records", 2000, "--seed", 0, "--workers", RANKS], False),
        ("manifest", ["-m", "sharding.prepare", "ptbxl", "--root", data / "ptbxl", "--out", manifest], False),
        ("tokenizer", ["launchers/train_tokenizer.py", *zero1, "--manifest", manifest, "--output_dir", tokenizer, *TOKENIZER], True),
        ("shards", ["-m", "sharding.shard", "--manifest", manifest, "--tokenizer", tokenizer, "--out", shards], False),
        ("tasks", [*join, "ecgqa", "--qa", data / "ecgqa"], False),
        ("tasks", [*join, "reports"], False),
        ("pretrain", ["launchers/pretrain.py", *zero2, "--backbone", "tiny", "--shards", shards, "--output_dir", pretrain, *PRETRAIN], True),
        ("instruct", ["launchers/instruct.py", *zero2, "--backbone", pretrain, "--shards", tasks, "--output_dir", instruct, *INSTRUCT], True),
        ("evaluate", ["launchers/evaluate.py", "--model", instruct, "--shards", tasks, "--split", "test", "--output_dir", evaluate], True),
    ]


def run(name: str, command: list, distributed: bool) -> dict:
    """Run one stage; returns seconds and the peak memory (MB, summed over its processes). Ends the demo if the stage fails."""
    words = list(map(str, command))
    if distributed:
        launcher = Path(sys.executable).with_name("deepspeed")
        words = [str(launcher), "--num_gpus", str(RANKS), "--master_port", str(_free_port()), *words]
    else:
        words = [sys.executable, *words]
    print(f"\n=== {name}: {shlex.join(words)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    started, peak = time.time(), 0.0
    process = subprocess.Popen(words, env=environment)
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        time.sleep(0.5)
    if process.returncode:
        sys.exit(f"demo: stage {name} failed with exit code {process.returncode}; mend what it says and run the same command again")
    return {"stage": name, "seconds": time.time() - started, "peak_mb": peak}


def _memory(pid: int) -> float:
    """Proportional set size of a process and its descendants in MB: shared pages count once."""
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for process in family:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, AttributeError):
            continue
    return total / 1e6


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def throughput(out: Path, name: str) -> str:
    """ECG/s and tokens/s of a training stage, the median of its log lines."""
    log = out / name / "log.jsonl"
    if not log.is_file():  # not a training stage
        return ""
    lines = [line for line in map(json.loads, log.read_text().splitlines()) if "ecgs_per_second" in line]
    if not lines:
        return ""
    middle = sorted(lines, key=lambda line: line["ecgs_per_second"])[len(lines) // 2]
    return f"{middle['ecgs_per_second']:.0f} ECG/s, {middle['tokens_per_second']:.0f} tokens/s"


def table(out: Path, measured: list[dict]) -> str:
    """What each stage cost, then the metrics beside their controls."""
    lines = [f"{'stage':<11}{'seconds':>9}{'peak MB':>9}   speed (memory: all processes together)"]
    for stage in measured:
        lines.append(f"{stage['stage']:<11}{stage['seconds']:>9.1f}{stage['peak_mb']:>9.0f}   {throughput(out, stage['stage'])}")
    lines.append(f"{'all':<11}{sum(s['seconds'] for s in measured):>9.1f}{max(s['peak_mb'] for s in measured):>9.0f}\n")
    metrics = json.loads((out / "evaluate" / "metrics.json").read_text())
    lines.append(text_table(metrics))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo", help="folder for all stages; run again, it goes on where it stopped")
    out = Path(os.path.relpath(parser.parse_args().out, ROOT))  # the stages run in the project's root
    os.chdir(ROOT)
    # stage -> cost, two commands of one stage added up; a stage that an earlier run completed keeps the cost it had then
    file = out / "costs.json"
    costs = json.loads(file.read_text()) if file.is_file() else {}
    costs = {name: cost for name, cost in costs.items() if (out / name / COMPLETE[name]).is_file()}
    kept = set(costs)
    for name, command, distributed in stages(out):
        cost = run(name, command, distributed)
        if name in kept:
            continue
        before = costs.get(name, {"seconds": 0.0, "peak_mb": 0.0})
        costs[name] = {"stage": name, "seconds": before["seconds"] + cost["seconds"], "peak_mb": max(before["peak_mb"], cost["peak_mb"])}
        file.write_text(json.dumps(costs))
    print(f"\nSynthetic ECGs; research software, not for diagnosis.\n\n{table(out, list(costs.values()))}")
    print(f"\nreport: {(out / 'evaluate' / 'report.html').resolve()}")


if __name__ == "__main__":
    main()

"""All that needs a GPU, in one command of at most eight minutes on one H100 of 80 GB.

    python benchmarks/gpu_suite.py                                          # writes benchmarks/results/gpu-<name>.json and .md
    python benchmarks/gpu_suite.py --parts kernels attention
    python benchmarks/gpu_suite.py --cpu_rehearsal --out /tmp/rehearsal     # tiny shapes on the CPU: does the code run?

Every part has a process and a time limit of its own, so that one that fails leaves the others; it is listed with its error. Where there is no GPU it says
so, writes nothing and exits 0. All figures come from the run; nothing is filled in by hand. Tokens are real ones: padding is not counted.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # this folder has a sharding.py and a tokenizer.py too

import torch

MINUTES = 8

# name -> (module.function of this folder, its arguments, seconds it may take); the most telling first, for the eight minutes may run out
PARTS = {
    "kernels": ("gpu_parts.kernels", (), 60),
    "attention": ("gpu_parts.attention", (), 120),  # FlexAttention is compiled for two models
    "tokenizer": ("gpu_parts.tokenizer", (), 60),
    "zero2-none": ("gpu_training.training", (2, "none"), 90),
    "zero2-full": ("gpu_training.training", (2, "full"), 90),
    "hf-full": ("gpu_training.hf_trainer", ("full",), 90),
    "instruct-none": ("gpu_training.instruction", ("none",), 120),
    "hf-instruct-none": ("gpu_training.hf_instruction", ("none",), 90),
    "instruct-full": ("gpu_training.instruction", ("full",), 120),
    "zero3-full": ("gpu_training.training", (3, "full"), 90),
    "zero2-every_2": ("gpu_training.training", (2, "every_2"), 90),
    "hf-none": ("gpu_training.hf_trainer", ("none",), 90),
}


def run_part(name: str, rehearsal: bool, limit: float) -> dict:
    """{"seconds", "rows"} of a part in a process of its own, or {"seconds", "error"}."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--parts", name, "--result", str(result), *(["--cpu_rehearsal"] if rehearsal else [])]
        environment = {**os.environ, **({"DS_ACCELERATOR": "cpu"} if rehearsal else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})}
        with open(Path(folder) / "output", "w+") as output:
            try:
                code = subprocess.run(command, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=limit).returncode
                problem = f"exit code {code}"
            except subprocess.TimeoutExpired:
                problem = f"not done after {limit:.0f} s"
            output.seek(0)
            said = output.read()
        seconds = round(time.perf_counter() - started, 1)
        if result.is_file():  # some libraries crash on leaving
            return {"seconds": seconds, "rows": json.loads(result.read_text())}
    last = next((text for text in reversed(said.splitlines()) if re.match(r"\S*(Error|Exception|Interrupt)\b", text)), "")
    return {"seconds": seconds, "error": f"{problem} {last}".strip()[:500], "output": said[-3000:]}


def markdown(record: dict) -> str:
    """Tables of the parts; rows of the same keys share one."""
    lines = [f"# {record['device']}", "", f"{', '.join(f'{k} {v}' for k, v in record['versions'].items())}. `{record['command']}`", ""]
    previous = None
    for row in (row for part in record["parts"].values() for row in part.get("rows", [])):
        if list(row) != previous:
            lines += ["", f"| {' | '.join(row)} |", "|---" * len(row) + "|"]
        lines.append("| " + " | ".join(f"{v:,.4g}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()) + " |")
        previous = list(row)
    failed = [f"- {name}: {part['error']}" for name, part in record["parts"].items() if "error" in part]
    return "\n".join([*lines, *(["", "Failed:", "", *failed] if failed else [])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--cpu_rehearsal", action="store_true", help="tiny shapes on the CPU; needs --out")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # run one part here, write its rows there
    args = parser.parse_args()
    if not args.cpu_rehearsal and not torch.cuda.is_available():
        print("no GPU is at hand: nothing was measured, nothing is written")
        return
    if args.result:
        path, words, _ = PARTS[args.parts[0]]
        module, function = path.split(".")
        part = getattr(importlib.import_module(f"benchmarks.{module}"), function)
        args.result.write_text(json.dumps(part(*words, rehearsal=args.cpu_rehearsal)))
        return
    if args.cpu_rehearsal and not args.out:
        parser.error("--cpu_rehearsal needs --out: its figures mean nothing and must not stand beside real ones")
    import deepspeed
    import transformers

    device = "CPU rehearsal" if args.cpu_rehearsal else torch.cuda.get_device_name()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, deepspeed)}
    record = {"device": device, "versions": versions, "command": " ".join(["python", "benchmarks/gpu_suite.py", *sys.argv[1:]]), "parts": {}}
    deadline = time.perf_counter() + 60 * MINUTES - 10
    for name in args.parts:
        limit = 600 if args.cpu_rehearsal else min(PARTS[name][-1], deadline - time.perf_counter())
        part = run_part(name, args.cpu_rehearsal, limit) if limit > 20 else {"seconds": 0, "error": f"not run: the {MINUTES} minutes were over"}
        record["parts"][name] = part
        print(f"{name}: {part['seconds']} s {part.get('error', '')}", flush=True)
    out = args.out or ROOT / "benchmarks" / "results"
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(record))
    print(f"\n{markdown(record)}\n{path}")


if __name__ == "__main__":
    main()

"""Judge a model on a dataset that it was not trained on (zero-shot), from the dataset's download: one command, which goes on where it was killed.

python launchers/transfer.py --model L --source ptbxl --root PTBXL --qa ECGQA --out Z                 # on a machine without a GPU: --num_gpus 2
python launchers/transfer.py --model L --source ptbxl --root PTBXL --qa ECGQA --out Z --split valid --noise_db 20 10 0

Encodes the dataset with the ECG tokenizer that the model carries (to Z/manifest and Z/shards), joins its questions and reports to it (Z/tasks), and judges the
model's answers (Z/evaluate) with launchers/evaluate.py, which takes all further arguments and refuses patients that the model was trained on.
A source that needs options of its own: `python -m sharding.archive`, `python -m sharding.shard_tasks`, launchers/evaluate.py, one after the other.
"""

import argparse
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sharding.manifest import read_summary
from sharding.sources import SOURCES
from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.lm.carried import carried_in, ecg_tokenizer_of


def run(*words) -> None:
    """A stage; ends the program with its exit code if it fails."""
    words = list(map(str, words))
    print(f"\n=== {shlex.join(words)}", flush=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    code = subprocess.run(words, env={**os.environ, "PATH": path, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}).returncode
    if code:
        sys.exit(code)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="folder written by launchers/instruct.py, launchers/pretrain.py or toolkit.lm.merge")
    parser.add_argument("--source", required=True, choices=SOURCES, help="what the dataset is, as for `python -m sharding.prepare`")
    parser.add_argument("--root", type=Path, required=True, help="the dataset's folder, as downloaded")
    parser.add_argument("--qa", type=Path, help="ECG-QA's questions about it (a folder of .json files); without it reports alone are judged")
    parser.add_argument("--tokenizer", type=Path, help="ECG tokenizer that the model was trained with (default: the one in its folder)")
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is made; run again, it goes on")
    parser.add_argument("--num_gpus", type=int, help="ranks on this machine (default: its GPUs)")
    args, further = parser.parse_known_args()
    if args.source == "cinc" and not args.qa:
        raise UserError("--source cinc: has no reports, so there is nothing to judge without questions; name some by --qa")
    ecg_tokenizer_of(args.model, args.tokenizer)  # that it is the right one is known at once, not after hours of encoding
    tokenizer = args.tokenizer or carried_in(args.model)
    shards, tasks = args.out / "shards", args.out / "tasks"
    run(sys.executable, "-m", "sharding.archive", args.source, "--root", args.root, "--tokenizer", tokenizer, "--out", args.out)
    reports = read_summary(args.out / "manifest").get("reports", 0)
    if not reports and not args.qa:
        raise UserError(f"--qa: the ECGs of {args.root} have no reports, so there is nothing to judge without questions; name a folder of ECG-QA")
    join = sys.executable, "-m", "sharding.shard_tasks", "--shards", shards, "--out", tasks
    if args.qa:
        run(*join, "ecgqa", "--qa", args.qa)
    if reports:
        run(*join, "reports")
    ranks = ["--num_gpus", args.num_gpus] if args.num_gpus else []
    run("deepspeed", "--master_port", free_port(), *ranks, ROOT / "launchers" / "evaluate.py", "--model", args.model, "--shards", tasks,
        "--output_dir", args.out / "evaluate", *further)  # fmt: skip


if __name__ == "__main__":
    exit_2_on_user_error(main)()

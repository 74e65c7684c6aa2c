"""Look at a machine, or at all ranks of a cluster, before a run: each finding with its mend. Exit code 1 if one is an error, 2 for a mistake in arguments.

python -m toolkit.doctor                                                                   # this machine
python -m toolkit.doctor --shards S --deepspeed ds_configs/zero2.json --output_dir P       # and what a run will be given
deepspeed --num_gpus 2 --module toolkit.doctor --output_dir P                              # and between all ranks: clocks, all-reduce, pairs
srun --ntasks-per-node 8 --cpus-per-task N --kill-on-bad-exit=1 python -m toolkit.doctor --output_dir P --json   # the same under SLURM, N cores a rank

--json prints one object on one line; under the deepspeed launcher, which writes lines of its own, it is the one that begins with {.
"""

import argparse
import contextlib
import json
import math
import os
import sys

from toolkit.doctor.finding import checked, error, report_of, table
from toolkit.doctor.software import check_versions
from toolkit.errors import UserError, exit_2_on_user_error, first_line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shards", nargs="+", default=[], metavar="S", help="folders or URLs of shards: index, sizes, one sample a split")
    parser.add_argument("--tokenizer", metavar="T", help="ECG tokenizer that should have made them")
    parser.add_argument("--model", metavar="P", help="model or adapter that should know their ECG tokens")
    parser.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed configuration, resolved as the trainers resolve it")
    parser.add_argument("--output_dir", metavar="P", help="run folder: its disk, checkpoints, lock, a STOP file that was left")
    parser.add_argument("--timeout", type=float, default=120, metavar="SECONDS", help="for the ranks to answer, and again for what they measure (default 120)")
    parser.add_argument("--json", action="store_true", help="one object instead of the table")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # of the deepspeed launcher
    args = parser.parse_args()
    if not 0 < args.timeout < math.inf:
        raise UserError(f"--timeout must be a number of seconds above 0, not {args.timeout:g}")
    return args


@exit_2_on_user_error
def main() -> None:
    args, out = parse(), sys.stdout

    def show(report: dict) -> None:
        print(json.dumps(report) if args.json else table(report), file=out, flush=True)

    with contextlib.redirect_stdout(sys.stderr):  # what libraries say is no part of the report
        try:
            from toolkit.doctor.examination import examine
        except ImportError as problem:  # a broken installation is what the doctor may be asked about
            broken = error("versions", f"{problem.name or 'a package'} does not import: {first_line(problem)}", "pip install -r requirements.lock")
            show(report_of({0: [*checked("versions", check_versions), broken]}, {os.uname().nodename: [0]}, {"all else": "needs what does not import"}, {}))
            failed = True
        else:
            failed = examine(args, show)
    os._exit(failed)  # not sys.exit: a thread may be in a collective that never ends


if __name__ == "__main__":
    main()

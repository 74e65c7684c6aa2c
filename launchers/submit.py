"""Check a recipe and submit its stages to SLURM, each after the one before: one sbatch of launchers/slurm/ a stage.

    python launchers/submit.py recipes/ptbxl-line.yaml --nodes 4 --dry-run                    # checks, and shows what would be submitted
    python launchers/submit.py recipes/ptbxl-line.yaml --nodes 4 --chain pretrain,instruct    # these stages alone
    python launchers/submit.py recipes/llama3.2-3b-pretrain.yaml --nodes 2 --time 24:00:00 -- --qos=long     # what is behind -- goes to every sbatch

Sharding is an array of --shard_jobs jobs that share the work. A stage starts when the one before is complete; what is complete already ends at once, so the
same command again goes on where a chain was broken off. Run it in the project's folder: the paths of recipes and batch scripts are relative to it.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ENVIRONMENT = dict(os.environ)  # what sbatch is given, and the jobs inherit: not the next line
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says, on a login node, that it found no GPU

from launchers.submit_checks import Stage, chain_of, check, size_of, understand
from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.lm.flops import GPUS
from toolkit.recipe import STAGES

TAKEN = r"--(nodes|gpus-per-node|array|dependency|parsable)\b|-[Nad]"  # options of sbatch that a stage's command holds already


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("recipe", help="YAML file: arguments of one launcher, or sections (recipes/ptbxl-line.yaml)")
    made.add_argument("--nodes", type=int, required=True, help="nodes of each job of pretraining, tuning and evaluation; the tokenizer trains on one")
    made.add_argument("--chain", help=f"stages, in order, with commas: {','.join(STAGES)} (default: all sections of the recipe)")
    made.add_argument("--shard_jobs", type=int, default=8, help="jobs of one node each that share the sharding (default: %(default)s)")
    made.add_argument("--dry-run", "--dry_run", action="store_true", help="check and show, submit nothing; needs no SLURM")
    made.add_argument("--partition", help="SLURM's, of all jobs")
    made.add_argument("--account", help="SLURM's, of all jobs")
    made.add_argument("--time", help="SLURM's time limit of each job; a trainer that reaches it saves and is queued again")
    made.add_argument(
        "--gpus_per_node",
        type=int,
        help="GPUs, and so ranks, of each node (default: as the batch scripts say; the tokenizer trains on one); 0: none, RANKS_PER_NODE ranks (1)",
    )
    made.add_argument("--gpu", choices=GPUS, help="which GPUs they are: then pretraining's memory is planned too (python -m toolkit.plan)")
    return made


def commands(args: argparse.Namespace, stages: list[Stage], further: list[str]) -> list[list[str]]:
    """One sbatch command a stage, without its dependency."""
    shared = [f"--{name}={getattr(args, name)}" for name in ("partition", "account", "time") if getattr(args, name)]
    made = []
    for stage in stages:
        if stage.name == "shard":
            size = ["--nodes=1", f"--array=0-{args.shard_jobs - 1}"]
        else:
            nodes, ranks, with_gpus = size_of(stage.name, args.nodes, args.gpus_per_node)
            size = [f"--nodes={nodes}", *([] if args.gpus_per_node is None else [f"--gpus-per-node={ranks if with_gpus else 0}"])]
        name = f"--job-name={Path(args.recipe).stem}-{stage.name}"
        made.append(["sbatch", "--parsable", name, *size, *shared, *further, f"launchers/slurm/{stage.name}.sbatch", args.recipe])
    return made


def after(command: list[str], job: str) -> list[str]:
    """The command with its dependency: a job whose forerunner failed is cancelled by SLURM and does not wait for ever."""
    return [*command[:2], f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", *command[2:]]


def show(args: argparse.Namespace, stages: list[Stage], made: list[list[str]]) -> str:
    """The plan of a dry run."""
    lines, before = [], None
    for stage, command in zip(stages, made):
        size = f"array of {args.shard_jobs} jobs of one node"
        if stage.name != "shard":
            nodes, ranks, with_gpus = size_of(stage.name, args.nodes, args.gpus_per_node)
            size = f"{nodes} node{'s' * (nodes > 1)} of {ranks} rank{'s' * (ranks > 1)}{'' if with_gpus else ' without GPU'}, {nodes * ranks} in all"
        folders = dict.fromkeys(folder for folders in stage.writes.values() for folder in folders)
        lines += [f"{stage.name}: {size}" + (f"; after {before}" if before else ""), f"  writes  {' '.join(folders)}"]
        lines.append("  command " + shlex.join(after(command, f"ID_OF_{before}") if before else command))
        before = stage.name
    return "\n".join(lines)


def submit(stages: list[Stage], made: list[list[str]]) -> list[str]:
    """Job ids. If one cannot be submitted, those before it are cancelled."""
    jobs: list[str] = []
    try:
        for stage, command in zip(stages, made):
            done = subprocess.run(after(command, jobs[-1]) if jobs else command, env=ENVIRONMENT, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"stage {stage.name}: {done.stderr.strip() or f'sbatch ended with {done.returncode}'}")
            print(done.stderr, end="", file=sys.stderr)  # what a site's sbatch says beside the number: budgets, defaults
            jobs.append(done.stdout.strip().splitlines()[-1].split(";")[0])  # 12;cluster
            print(f"{jobs[-1]:>10}  {stage.name}", flush=True)
    except BaseException:
        if jobs:
            gone = subprocess.run(["scancel", *jobs], env=ENVIRONMENT).returncode == 0
            said = f"nothing is left queued: {', '.join(jobs)} cancelled" if gone else f"still queued, for scancel failed: scancel {' '.join(jobs)}"
            print(said, file=sys.stderr)
        raise
    return jobs


def check_place(args: argparse.Namespace, names: list[str], further: list[str]) -> None:
    """Raises UserError naming the argument, or what is missing on this machine."""
    if taken := [word for word in further if re.match(TAKEN, word)]:
        raise UserError(f"-- {taken[0]}: is set here for each stage, by --nodes, --gpus_per_node, --shard_jobs and the chain; leave it out")
    for name in ("nodes", "shard_jobs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: must be at least 1")
    if args.gpus_per_node is not None and args.gpus_per_node < 0:
        raise UserError("--gpus_per_node: must be at least 0")
    if Path.cwd() != ROOT:
        raise UserError(f"run it in {ROOT}: the paths of recipes and batch scripts are relative to that folder")
    if unknown := [name for name in names if name not in STAGES]:
        raise UserError(f"--chain: there is no stage {unknown[0]!r}; there are {','.join(STAGES)}")
    if names != sorted(set(names), key=STAGES.index):
        raise UserError(f"--chain: each stage once, in the order of the line: {','.join(sorted(set(names), key=STAGES.index))}")
    if not args.dry_run and not shutil.which("sbatch"):
        raise UserError("sbatch is not on the PATH: run it on a login node of the cluster, or with --dry-run")


@exit_2_on_user_error
def main(argv: list[str]) -> None:
    own, further = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser().parse_args(own)
    names = args.chain.split(",") if args.chain else chain_of(args.recipe)
    check_place(args, names, further)
    stages = [understand(args.recipe, name) for name in names]
    warnings = check(stages, args.nodes, args.gpus_per_node, args.gpu)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    made = commands(args, stages, further)
    if args.dry_run:
        print(show(args, stages, made))
        return
    jobs = submit(stages, made)
    runs = [f"{stage.args.output_dir}/logs" for stage in stages if stage.name != "shard"]
    print(f"watch:  squeue --jobs {','.join(jobs)}; logs slurm-{Path(args.recipe).stem}-*.out here" + (f", of each node in {' '.join(runs)}" if runs else ""))
    print(f"stop:   scancel {' '.join(jobs)}")


if __name__ == "__main__":
    main(sys.argv[1:])

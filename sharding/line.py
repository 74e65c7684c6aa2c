"""The sections `shard` and `tasks` of a recipe: from a download to token shards (sharding.archive), and to task shards (sharding.shard_tasks).

    python -m sharding.line recipes/ptbxl-line.yaml                            # --root ..., and all else of sharding.archive, override the section
    sbatch --array=0-7 launchers/slurm/shard.sbatch recipes/ptbxl-line.yaml    # eight jobs share the work; the same bytes

Whichever process finds the shards complete makes the tasks, which takes seconds; one process at a time, and made again they are the same.
Killed and started again, alone or in another array, it goes on with what is left.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sharding import archive, engine, shard_tasks
from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.recipe import STAGES, TASKS, has_sections, load, read, where

LOCK = ".tasks.lock"


def shard_arguments(recipe: str, overrides: list[str] = ()) -> argparse.Namespace:
    """The arguments of sharding.archive that the section `shard` holds; `overrides` are of the command line. Raises UserError naming file and key."""
    parser, sources = archive.parsers()
    section = dict(read(recipe, "shard"))
    source = section.pop("source", None)
    if source not in sources:
        raise UserError(f"{where(recipe, 'shard')}: source: must be one of {', '.join(sources)}, not {source!r}")
    return parser.parse_args([source, *words(section, sources[source], where(recipe, "shard")), *overrides])


def task_arguments(recipe: str, shards: Path) -> list[list[str]]:
    """The command lines of sharding.shard_tasks that the section `tasks` holds; none without the section. `shards` are what the tasks join by default."""
    sections, commands = load(recipe), []
    for i, row in enumerate(sections.get(TASKS, []) if has_sections(sections) else []):
        entry, parser = f"{where(recipe, TASKS)}, entry {i + 1}", shard_tasks.parser()
        if row.get("kind") not in shard_tasks.KINDS:
            raise UserError(f"{entry}: kind: must be one of {', '.join(shard_tasks.KINDS)}, not {row.get('kind')!r}")
        more = {name: value for name, value in row.items() if name != "kind"}
        commands.append([row["kind"], *words({"shards": str(shards), **more}, parser, entry)])
        parser.parse_args(commands[-1])  # what is missing should not show after hours of sharding
    return commands


def words(section: dict, parser: argparse.ArgumentParser, opening: str) -> list[str]:
    """A section as a command line of `parser`. Raises UserError, opening with `opening`, for a key that it does not know or a value of the wrong kind."""
    options = {
        option.removeprefix("--").replace("-", "_"): (option, action)
        for action in parser._actions
        for option in action.option_strings
        if option not in ("-h", "--help")
    }
    said = []
    for name, value in section.items():
        option, action = options.get(str(name).replace("-", "_"), (None, None))
        if action is None:
            raise UserError(f"{opening}: there is no argument {name!r}; there are {', '.join(options)}")
        if isinstance(value, bool) != (action.nargs == 0) or value is None or isinstance(value, dict):
            raise UserError(f"{opening}: {name}: must be {'true or false' if action.nargs == 0 else 'a value'}, not {value!r}")
        if isinstance(value, list) and action.nargs != "+":
            raise UserError(f"{opening}: {name}: must be one value, not {value!r}")
        if action.nargs == "+":
            said += [option, *map(str, value if isinstance(value, list) else [value])]
        elif value is not False:
            said.append(option if value is True else f"{option}={value}")
    return said


@contextlib.contextmanager
def turn(shard: argparse.Namespace) -> Iterator[None]:
    """In a job array wait for a process of the same rank, of which there must be one: jobs resubmitted as --array=3 and as --array=4 are both rank 0 of 1."""
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        yield
        return
    engine.guarded(shard.out, lambda: shard.out.mkdir(parents=True, exist_ok=True))
    lock = FileLock(shard.out / f".rank-{shard.rank}-of-{shard.world_size}.lock", poll_interval=1)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{shard.out}: another job does the work of rank {shard.rank} of {shard.world_size}; this one waits for its end", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m sharding.line", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help=f"YAML file with a section shard, and one called tasks if tasks are wanted (sections: {', '.join((*STAGES, TASKS))})")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of sharding.archive that override the section shard")
    args = parser.parse_args(argv)
    shard = shard_arguments(args.recipe, args.arguments)
    tasks = task_arguments(args.recipe, shard.out / "shards")
    with turn(shard):
        complete = archive.archive(shard)
    if not complete:
        if tasks:
            print("tasks: left to the process that completes the shards")
        return
    with FileLock(shard.out / LOCK):
        for command in tasks:
            shard_tasks.main(command)


if __name__ == "__main__":
    exit_2_on_user_error(main)(sys.argv[1:])

"""From a raw download to token shards in one command: `sharding.prepare` into OUT/manifest, then `sharding.shard` into OUT/shards.

    python -m sharding.archive ptbxl --root ptb-xl-1.0.3 --tokenizer T --out data/ptbxl
    srun -n 8 python -m sharding.archive mimic --root mimic-iv-ecg --tokenizer T --out data/mimic     # eight machines share the work

Killed and started again, by the same command or on other machines, it goes on where it stopped; complete, it says so.
"""

import argparse
import contextlib
import time
from pathlib import Path

from filelock import FileLock, Timeout

from sharding import prepare, shard
from sharding.engine import PARTS
from sharding.manifest import PREPARE
from sharding.sources import SOURCES
from toolkit.errors import exit_2_on_user_error

SILENCE = 300  # seconds without a new part of the manifest after which other ranks count as dead, or as queued jobs of an array


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The command's parser, and that of each source."""
    parser = argparse.ArgumentParser("python -m sharding.archive", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    children = prepare.add_sources(parser)
    for child in children:
        child.add_argument("--out", type=Path, required=True, help="folder for manifest/ and shards/")
        shard.add_arguments(child)
    return parser, dict(zip(SOURCES, children))


def main(argv: list[str] | None = None) -> None:
    archive(parsers()[0].parse_args(argv))


def archive(args: argparse.Namespace) -> bool:
    """Make manifest and shards; returns whether the shards are complete, which they are not while other ranks still work."""
    prepare.check_arguments(args)
    shard.load(args)  # what is wrong with it should not show after hours of reading
    both, of_shard = vars(args), ("tokenizer", "shard_size", "device", "on_bad_record")
    manifest = argparse.Namespace(**{name: value for name, value in both.items() if name not in of_shard} | {"out": args.out / "manifest"})
    if not prepare.prepare(manifest):
        wait_for(manifest)
    return shard.shard(argparse.Namespace(**both | {"manifest": args.out / "manifest", "out": args.out / "shards"}))


def wait_for(manifest: argparse.Namespace) -> None:
    """Until the manifest is complete. What the other ranks leave undone one of those that wait does: theirs may be dead, or not have begun."""
    print(f"rank {manifest.rank} waits for the other ranks to complete {manifest.out}", flush=True)
    parts, heard = -1, time.time()
    while not (manifest.out / PREPARE).is_file():
        now = len(list((manifest.out / PARTS).glob("records-*")))
        parts, heard = (now, time.time()) if now > parts else (parts, heard)
        if time.time() - heard > SILENCE:
            with contextlib.suppress(Timeout), FileLock(manifest.out / PARTS / "left.lock", timeout=0):
                print(f"rank {manifest.rank} does what is left, after {SILENCE / 60:.0f} min without a new part", flush=True)
                prepare.prepare(argparse.Namespace(**vars(manifest) | {"rank": 0, "world_size": 1}))
        time.sleep(1)


if __name__ == "__main__":
    exit_2_on_user_error(main)()

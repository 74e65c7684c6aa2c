"""From a raw download to token shards in one command: `sharding.prepare` into OUT/manifest, then `sharding.shard` into OUT/shards.

    python -m sharding.archive ptbxl --root ptb-xl-1.0.3 --tokenizer T --out data/ptbxl
    srun -n 8 python -m sharding.archive mimic --root mimic-iv-ecg --tokenizer T --out data/mimic     # eight machines share the work

Killed and started again, by the same command or on other machines, it goes on where it stopped; complete, it says so.
"""

import argparse
import time
from pathlib import Path

from sharding import prepare, shard
from sharding.engine import PARTS
from sharding.manifest import PREPARE
from toolkit.errors import UserError, exit_2_on_user_error

SILENCE = 1800  # seconds without a new part of the manifest after which other ranks count as dead


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m sharding.archive", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for child in prepare.add_sources(parser):
        child.add_argument("--out", type=Path, required=True, help="folder for manifest/ and shards/")
        shard.add_arguments(child)
    args = parser.parse_args(argv)
    prepare.check_arguments(args)
    shard.load(args)  # what is wrong with it should not show after hours of reading
    both, of_shard = vars(args), ("tokenizer", "shard_size", "device", "on_bad_record")
    manifest = argparse.Namespace(**{name: value for name, value in both.items() if name not in of_shard} | {"out": args.out / "manifest"})
    if not prepare.prepare(manifest):
        wait_for(manifest)
    shard.shard(argparse.Namespace(**both | {"manifest": args.out / "manifest", "out": args.out / "shards"}))


def wait_for(manifest: argparse.Namespace) -> None:
    """Until other ranks have completed the manifest; raises `UserError` if they seem to be dead."""
    print(f"rank {manifest.rank} waits for the other ranks to complete {manifest.out}", flush=True)
    parts, heard = -1, time.time()
    while not (manifest.out / PREPARE).is_file():
        now = len(list((manifest.out / PARTS).glob("records-*")))
        parts, heard = (now, time.time()) if now > parts else (parts, heard)
        if time.time() - heard > SILENCE:
            raise UserError(f"--world_size {manifest.world_size}: other ranks completed no part of {manifest.out} in {SILENCE // 60} min; look why")
        time.sleep(1)


if __name__ == "__main__":
    exit_2_on_user_error(main)()

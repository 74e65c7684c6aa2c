"""Run `sharding.prepare` and `sharding.shard` and kill them at random moments: python tests/sharding/killed_runs.py ROOT TOKENIZER OUT KILLS

A process of its own that forks for every run: the imports, two seconds of every start, are paid once, and torch has done nothing before
the fork. Prints, as json, how many runs were killed and what stood in OUT/shards after each kill: {name of tar: sha256}.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from sharding import prepare, shard

prepare.PART, prepare.CHUNK = 8, 4


def sha256(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*")) if path.suffix in (".tar", ".npy")}


def attempt(call, delay: float) -> bool:
    """Whether the run was killed after `delay` seconds, and not at its end before."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException), contextlib.redirect_stdout(io.StringIO()):
            call()
            code = 0
        os._exit(code)
    deadline = time.monotonic() + delay
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.WEXITSTATUS(status) == 0, "a run failed"
            return False
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def main(root: str, tokenizer: str, out: Path, kills: int) -> None:
    manifest, shards = out / "manifest", out / "shards"
    make_manifest = ["ptbxl", "--root", root, "--out", str(manifest), "--workers", "1"]
    make_shards = ["--manifest", str(manifest), "--tokenizer", tokenizer, "--out", str(shards), "--workers", "1", "--shard_size", "4"]
    rng, killed, seen = random.Random(0), {"prepare": 0, "shard": 0}, []
    while killed["shard"] < kills:
        shutil.rmtree(out, ignore_errors=True)
        while attempt(lambda: prepare.main(make_manifest), rng.uniform(0.0, 0.05)):
            killed["prepare"] += 1
        while attempt(lambda: shard.main(make_shards), rng.uniform(0.0, 0.4)):
            killed["shard"] += 1
            seen.append(sha256(shards))
    print(json.dumps({"killed": killed, "seen": seen}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))

"""Is --output_dir one folder on all nodes, and does a lock that one node holds keep the others out?"""

import contextlib
import fcntl
import secrets
from collections.abc import Iterator
from pathlib import Path

from toolkit.doctor.finding import Finding, error, ok


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[str]:
    """A new file in the folder, locked as the run's lock is; its name."""
    path = folder / f".doctor-{secrets.token_hex(4)}"
    try:
        with open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield path.name
    finally:
        path.unlink(missing_ok=True)


def look(path: Path) -> dict:
    """Of a file that another node holds: whether it is seen here, and whether its lock keeps this node out."""
    try:
        with open(path, "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return {"seen": True, "kept_out": True}
            return {"seen": True, "kept_out": False}
    except OSError:
        return {"seen": False, "kept_out": False}


def said_of_folder(folder: Path, seen: dict[str, dict]) -> Iterator[Finding]:
    """seen: what `look` found on each node but the first."""
    blind = [host for host, one in seen.items() if not one["seen"]]
    let_in = [host for host, one in seen.items() if one["seen"] and not one["kept_out"]]
    if blind:
        yield error(
            "shared folder", f"{folder} is another folder on {', '.join(blind)}: checkpoints would be in pieces, and STOP not seen",
            "name an --output_dir on a file system that all nodes mount",
        )  # fmt: skip
    if let_in:
        yield error(
            "shared folder", f"a lock in {folder} does not keep {', '.join(let_in)} out: two runs could train in one folder",
            "mount it with flock (Lustre) or with locks (NFS: without nolock or local_lock)",
        )  # fmt: skip
    if not blind and not let_in:
        yield ok("shared folder", f"{folder} is one folder on all {len(seen) + 1} nodes, and a lock of one keeps the others out")

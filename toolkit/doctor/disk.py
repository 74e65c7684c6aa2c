"""Folders: space, speed, and whether their file system keeps what checkpoints and the run's lock rely on."""

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from toolkit.doctor.finding import Finding, error, ok, warning

NETWORK = {"nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "fuse.glusterfs", "fuse.sshfs", "fuse.s3fs", "afs", "9p", "orangefs", "pvfs2"}
PROBE = 64 << 20  # bytes written to measure speed
FEW_BYTES, FEW_FILES = 10 << 30, 10_000  # a checkpoint of a model of 3 B parameters with AdamW is 39 GB, of 135 M 1.6 GB
SLOW = 50e6  # bytes/s: at this speed the 39 GB take 13 minutes


def existing(path: str | Path) -> Path:
    """The folder itself or, where it is still to be made, the nearest one above it that is there."""
    path = Path(path).expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def file_system(path: str | Path) -> str:
    """The type of the file system that a folder is on, as /proc/self/mountinfo calls it."""
    here, found = existing(path).resolve(), ("", "unknown")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ", 1)
        point = before.split()[4].encode().decode("unicode_escape")  # a space in it is \040
        if here.is_relative_to(point) and len(point) >= len(found[0]):
            found = point, after.split()[0]
    return found[1]


def refuses_writing(path: str | Path) -> str | None:
    """Why no file can be made in the folder, or in the nearest one above it; None if one can. It is tried: permissions alone do not tell of quotas."""
    try:
        with tempfile.NamedTemporaryFile(dir=existing(path), prefix=".doctor-") as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as problem:
        return problem.strerror
    return None


def check_disk(name: str, path: str | Path, how_else: str) -> Iterator[Finding]:
    """name: what the folder is called by. how_else: the argument or variable that names another."""
    folder, kind, elsewhere = existing(path), file_system(path), f"free some, or name another folder: {how_else}"
    space = os.statvfs(folder)
    free, inodes = space.f_bavail * space.f_frsize, space.f_favail
    said = f"{name} {path} ({kind})"
    scratch = folder / f".doctor-{secrets.token_hex(4)}"
    try:
        scratch.mkdir()
        speed, small = _speed(scratch, min(PROBE, free // 4))
        lost = _keeps(scratch)
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            which = "of this user's quota" if problem.errno == errno.EDQUOT else f"{_size(free)} and {inodes:,} files are free,"
            yield error("disk", f"{said} is full: {which} a file could not be written", elsewhere)
        else:
            yield error("disk", f"{said} cannot be written ({problem.strerror})", f"chmod u+rwx {quote(str(folder))}, or name another folder: {how_else}")
        return
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    about = f"{said}: {_size(free)} free, {speed / 1e6:,.0f} MB/s written and synced, {1e3 * small:.1f} ms for a small file"
    bad = False
    if lost:
        bad = True
        mend = {"flock": "mount it with flock (Lustre) or with locks (NFS), else two runs can train in one folder"}
        yield error("disk", f"{said} does not keep {' and '.join(lost)}", mend.get(lost[0], f"name a folder on another file system: {how_else}"))
    if free < FEW_BYTES:
        bad = True
        yield warning("disk", f"{about}: a checkpoint has 12 bytes a trained parameter, 1.6 GB of 135 M, 39 GB of 3 B", elsewhere)
    if space.f_files and inodes < FEW_FILES:  # 0: a file system that does not count files
        bad = True
        yield warning("disk", f"{said}: room for {inodes:,} files alone", elsewhere)
    if speed < SLOW:
        bad = True
        yield warning("disk", f"{about}: slow for checkpoints", f"raise --save_steps, or name a faster folder: {how_else}")
    if not bad:
        yield ok("disk", f"{about}; keeps locks and atomic renames{', a network file system' if kind in NETWORK else ''}")


def _speed(folder: Path, size: int) -> tuple[float, float]:
    """(bytes/s of a file written and synced, seconds for one of 4 kB, the median of five)."""
    block = os.urandom(1 << 20)  # zeros might be compressed
    started = time.perf_counter()
    _write(folder / "large", (block for _ in range(max(1, size >> 20))))
    rate = max(1, size >> 20) * len(block) / (time.perf_counter() - started)
    times = []
    for number in range(5):
        started = time.perf_counter()
        _write(folder / f"small-{number}", [block[:4096]])
        times.append(time.perf_counter() - started)
    return rate, sorted(times)[2]


def _write(path: Path, blocks) -> None:
    with open(path, "wb") as file:
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _keeps(folder: Path) -> list[str]:
    """What of flock (the lock of a run) and rename over an existing file (`latest`) does not work here."""
    lost = []
    with open(folder / "lock", "w") as first, open(folder / "lock", "w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lost.append("flock")
        else:
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lost.append("flock")  # given twice
            except OSError:
                pass
    for name in ("old", "new"):
        (folder / name).write_text(name)
    try:
        with open(folder / "old") as reader:
            os.replace(folder / "new", folder / "old")
            if (reader.read(), (folder / "old").read_text()) != ("old", "new"):
                lost.append("atomic rename")
    except OSError:
        lost.append("atomic rename")
    return lost


def _size(bytes: float) -> str:
    return f"{bytes / 1e9:,.1f} GB" if bytes >= 1e9 else f"{bytes / 1e6:,.1f} MB"

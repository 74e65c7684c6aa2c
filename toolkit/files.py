"""Files that are whole or not there."""

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from toolkit.errors import UserError


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out`, in place of what stood there, when the block ends, and vanishes when it raises."""
    out = out.absolute()
    temporary, old = (out.parent / f".{out.name}.{suffix}" for suffix in ("partial", "old"))
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not out.exists():  # killed between the two renames: `old` is the only copy
            old.rename(out)
        for left in (temporary, old):  # by a killed run
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    try:
        yield temporary
        if out.exists():
            out.rename(old)
        try:
            temporary.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def run_folder(path: str | Path) -> Path:
    """The folder of a run, made if it is not there. Raises UserError naming --output_dir if it cannot be written, or holds shards."""
    folder = Path(path)
    if (folder / "index.json").exists():
        raise UserError(f"--output_dir {folder} holds shards; name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}") from error
    return folder


def digest(path: str | Path) -> str:
    """16 hex digits of a file's sha256: what a later stage remembers of the files it was made from."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def share(folder: Path) -> None:
    """Give model files the mode of any other file: safetensors 0.8 lets their owner alone read them, and others of a cluster's group could not load them."""
    umask = os.umask(0o077)  # there is no other way to read it
    os.umask(umask)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o666 & ~umask)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path`, contents and name on the disk, when the block ends, and vanishes when it raises.

    The temporary name is new each time, and its file locked as long as it is written: several ranks may write the same file at once, and
    `sweep` takes only what killed ones left.
    """
    partial, file = _locked(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)  # before the lock goes: `sweep` would take it for a killed run's
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _locked(path: Path) -> tuple[Path, BinaryIO]:
    """A new temporary file beside `path`, locked. Another one if `sweep` took it in the moment before it was."""
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        file = open(partial, "xb")
        with contextlib.suppress(OSError):  # a file system without locks, where `sweep` takes nothing
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return partial, file
        file.close()


def sweep(folder: Path, name: str) -> None:
    """Remove what killed runs left of a file ('': of all) that `whole_file` wrote in a folder; a file that is being written stays."""
    for path in folder.glob(f".{name}*.partial"):
        with contextlib.suppress(OSError):  # its writer holds the lock, or has just completed it
            with open(path, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file as utf-8, whole or not at all: a reader, or a rerun after a crash, never sees half of it."""
    with whole_file(path) as file:
        file.write(text.encode())

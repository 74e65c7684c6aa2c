"""Files that are whole or not there."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

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
    """The folder of a run, made if it is not there. Raises UserError naming --output_dir if it cannot be written."""
    folder = Path(path)
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


def write_text(path: Path, text: str) -> None:
    """Write a file through a temporary name: a reader, or a rerun after a crash, never sees half of it."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)

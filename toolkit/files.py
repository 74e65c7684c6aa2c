"""Files that are whole or not there."""

import contextlib
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


def write_text(path: Path, text: str) -> None:
    """Write a file through a temporary name: a reader, or a rerun after a crash, never sees half of it."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    os.replace(temporary, path)

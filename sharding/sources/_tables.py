"""Finding and reading the tables of a download."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from toolkit.errors import UserError, first_line

CHUNK = 100_000  # rows of a table in memory at a time


def find_table(root: Path, name: str, dataset: str) -> Path:
    """The path of file `name` in `root`, or in its only subfolder that has one (where the zip unpacks to). Raises `UserError` naming --root."""
    found = [root / name] if (root / name).is_file() else sorted(root.glob(f"*/{name}"))
    if len(found) != 1:
        problem = f"has {len(found)} subfolders with a {name}" if found else f"has no {name}"
        raise UserError(f"--root {root} {problem}: name the folder of the {dataset} download that has it")
    return found[0]


def read_rows(path: Path, columns: dict[str, type | str]) -> Iterator[tuple]:
    """The rows of a csv or csv.gz as tuples of these columns, each of its type ("int64" or str; an empty cell of a str column is '').

    Raises `UserError` naming the file where it is unreadable, lacks a column or has something else than whole numbers in an int64 column.
    """
    try:
        have = pd.read_csv(path, nrows=0).columns
        if lacking := [column for column in columns if column not in have]:
            raise UserError(f"{path} has no column {', '.join(lacking)}: download it again")
        for frame in pd.read_csv(path, usecols=list(columns), dtype=columns, keep_default_na=False, chunksize=CHUNK):
            yield from zip(*(frame[column].tolist() for column in columns), strict=True)
    except (ValueError, OSError, EOFError) as error:  # ValueError: pandas' ParserError, UnicodeDecodeError; EOFError: a cut .gz
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not readable ({first_line(error)}): download it again") from error

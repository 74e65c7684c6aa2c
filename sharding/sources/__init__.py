"""The datasets `sharding/prepare.py` knows: every module of this folder but those named _*. Adding one touches nothing else.

A source is a module with

- a docstring: its first line is the `--help` of `python -m sharding.prepare NAME`, the rest says what the dataset is and what is taken from it.
- `OWN_SPLIT: str | None`: what the dataset's own split is called as a choice of --split ("strat_fold" for PTB-XL), None if it publishes none.
- `rows(root: Path, args: argparse.Namespace) -> Iterator[dict]`: one dict an ECG record, with the manifest's columns (sharding/manifest.py)
  except `qc` and `start`. `split` is '' where the dataset has none, `report` is its text before cleaning, `patient` = pseudonym(source, number).
  Keys are unique. For a record it leaves out, last of all, a dict {"left_out": why}, which is counted. Raises `UserError` naming the flag or the file.
- `add_arguments(parser)`, only if it has options; `args` holds their values.
"""

import importlib
import pkgutil

SOURCES = {name: importlib.import_module(f"{__name__}.{name}") for _, name, _ in pkgutil.iter_modules(__path__) if not name.startswith("_")}

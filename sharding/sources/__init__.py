"""The datasets `sharding/prepare.py` knows, by name. A source is a module with two functions:

- `tables(root) -> list[Path]`: the tables its rows come from, hashed to tell whether a manifest is up to date; `UserError` if missing.
- `rows(root) -> Iterator[dict]`: one dict an ECG with the manifest's columns except `qc`, in the order of the tables.
"""

from sharding.sources import ptbxl

SOURCES = {"ptbxl": ptbxl}

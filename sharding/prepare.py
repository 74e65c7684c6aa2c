"""Read and check every record of a dataset and write its manifest (see sharding/manifest.py).

    python -m sharding.prepare ptbxl --root ptb-xl-1.0.3 --out manifests/ptbxl
    python -m sharding.prepare ptbxl --root ptb-xl-1.0.3 --out manifests/try --limit 100   # two seconds

Writes M/manifest.parquet, M/quarantine.jsonl (records left out and why) and M/prepare.json (counts). Made again with the same arguments
and tables it does nothing. A record costs about 8 ms of one core: PTB-XL three minutes, less by the number of workers.
"""

import argparse
import os
import re
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from sharding.manifest import existing, fingerprint, summarise, summary_table, write_manifest
from sharding.sources import SOURCES
from toolkit.ecg.quality import check
from toolkit.ecg.records import RecordError, read_record
from toolkit.errors import UserError, exit_2_on_user_error


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m sharding.prepare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", choices=sorted(SOURCES), help="the dataset")
    parser.add_argument("--root", type=Path, required=True, help="the dataset's folder, as downloaded (or the one above it)")
    parser.add_argument("--out", type=Path, required=True, help="the manifest's folder, made whole or not at all")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=positive, default=cores, help="processes (default: %(default)s); the result is the same")
    parser.add_argument("--limit", type=positive, help="only the first LIMIT records of the table")
    parser.add_argument("--overwrite", action="store_true", help="make it again, in place of the manifest that --out holds")
    return parser.parse_args(argv)


def check_record(path: str) -> tuple[list[str], str, str]:
    """(flags, '', '') of a record that passes, else ([], reason, message)."""
    try:
        return check(read_record(path))[1], "", ""
    except RecordError as error:
        return [], error.reason, error.message


def check_all(paths: list[str], workers: int) -> list[tuple[list[str], str, str]]:
    """`check_record` of every path, in the order of `paths`."""
    with ProcessPoolExecutor(min(workers, len(paths))) as pool:
        return list(tqdm(pool.map(check_record, paths, chunksize=16), total=len(paths), unit=" ECGs", disable=None))


@exit_2_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    start = time.perf_counter()
    if not args.root.is_dir():
        raise UserError(f"--root {args.root} is no folder: name the folder of the {args.source} download")
    source = SOURCES[args.source]
    tables = [fingerprint(path) for path in source.tables(args.root)]
    arguments = {"source": args.source, "root": str(args.root.resolve()), "limit": args.limit, "tables": tables}
    if done := existing(args.out, arguments, args.overwrite):
        print(f"{args.out} is complete: {done['kept']} ECGs, same arguments and tables (--overwrite makes it again)")
        return

    rows = list(islice(source.rows(args.root), args.limit))
    if not rows:
        raise UserError(f"--root {args.root}: {tables[0]['file']} has no rows: download it again")
    key, times = Counter(row["key"] for row in rows).most_common(1)[0]
    if times > 1:
        raise UserError(f"--root {args.root}: {tables[0]['file']} has {times} rows for {key}: remove the duplicates")
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", row["key"]) for row in rows)

    kept, quarantine = [], []
    for row, (flags, reason, message) in zip(rows, check_all([row["path"] for row in rows], args.workers), strict=True):
        if reason:
            quarantine.append({"key": row["key"], "path": row["path"], "reason": reason, "message": message})
        else:
            kept.append({**row, "qc": flags})
    if not kept:
        first = "{path}: {reason}, {message}".format(**quarantine[0])
        raise UserError(f"--root {args.root}: none of {len(rows)} records can be used: look at the first ({first})")
    summary = {"arguments": arguments, **summarise(kept, quarantine), "seconds": round(time.perf_counter() - start, 1)}
    write_manifest(args.out, kept, quarantine, summary)
    print(f"{args.out}: {summary['kept']} of {summary['records']} ECGs kept, {summary['reports']} with a report, {summary['seconds']} s")
    print(summary_table(summary))


if __name__ == "__main__":
    main()

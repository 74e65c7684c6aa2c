"""Read and check every record of a dataset and write its manifest (see sharding/manifest.py).

    python -m sharding.prepare ptbxl --root ptb-xl-1.0.3 --out manifests/ptbxl
    python -m sharding.prepare ptbxl --root ptb-xl-1.0.3 --out manifests/try --limit 100     # two seconds
    srun -n 8 python -m sharding.prepare mimic --root mimic-iv-ecg --out manifests/mimic     # eight machines share the work
    python -m sharding.prepare csv --help                                                    # a source's own options

Writes M/manifest.parquet, M/quarantine.jsonl (ECGs left out and why) and M/prepare.json (every decision counted). Killed and started again
it goes on; complete, it says so.
"""

import argparse
import hashlib
import json
import time
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

from sharding import engine
from sharding.manifest import FILES, QUARANTINE, read_summary, summarise, summary_table, write_manifest
from sharding.reports import clean
from sharding.sources import SOURCES
from sharding.splits import assign
from toolkit.ecg.quality import read_checked
from toolkit.ecg.records import RecordError, windows
from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.shards.writer import KEY

ABSENT = "absent"  # the reason of a record whose files are not there
PART, CHUNK = 4096, 64  # records that end with a completion file; records that a process checks at a time
NOT_IDENTITY = ("rank", "world_size", "workers", "overwrite")  # arguments that do not change the manifest; nor do paths, only what is there


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m sharding.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for child in add_sources(parser):
        child.add_argument("--out", type=Path, required=True, help="the manifest's folder")
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def add_sources(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """One subcommand a source, with the options all sources share and its own."""
    commands, children = parser.add_subparsers(dest="source", required=True, metavar="SOURCE", help="the dataset"), []
    for name, source in SOURCES.items():
        summary = source.__doc__.strip().splitlines()[0]
        child = commands.add_parser(name, help=summary, description=source.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        child.add_argument("--root", type=Path, required=True, help="the dataset's folder, as downloaded")
        own = [source.OWN_SPLIT] if source.OWN_SPLIT else []
        choices = "the dataset's own, " * bool(own) + "7:1:2 by hash of the patient, or ECG-QA's official one"
        default = f"{own[0]} where all records have it, else hash" if own else "hash"
        child.add_argument("--split", choices=[*own, "hash", "ecgqa"], help=f"patient-level split: {choices} (default: {default})")
        child.add_argument("--ecgqa", type=Path, help="for --split ecgqa: ECG-QA's folder of this dataset, such as ecgqa/ptbxl")
        child.add_argument("--split_salt", default="heartspeed", help="another word gives another --split hash (default: %(default)s)")
        child.add_argument("--windows", choices=["first", "middle", "all"], default="first", help="10 s windows of a longer record (default: %(default)s)")
        child.add_argument(
            "--qc", choices=["drop", "flag"], default="drop",
            help="whether a flat, missing or saturated lead or an impossible amplitude quarantines the ECG or only flags it (default: %(default)s); "
            "a gap of over 100 ms always quarantines",
        )  # fmt: skip
        child.add_argument(
            "--keep_boilerplate", action="store_true", help="keep machine phrases in reports, such as 'unconfirmed report' (sharding/reports.py lists them)"
        )
        child.add_argument("--min_report_words", type=int, default=1, metavar="N", help="shorter reports count as none (default: %(default)s)")
        child.add_argument("--limit", type=int, help="only the first LIMIT records of the table")
        engine.add_arguments(child)
        if hasattr(source, "add_arguments"):
            source.add_arguments(child.add_argument_group(f"options of {name}"))
        children.append(child)
    return children


def check_arguments(args: argparse.Namespace) -> None:
    engine.check_arguments(args)
    if not args.root.is_dir():
        raise UserError(f"--root {args.root} is no folder: name the folder of the {args.source} download")
    if args.split == "ecgqa" and args.ecgqa is None:
        raise UserError("--split ecgqa: also name the folder of ECG-QA, such as --ecgqa ecgqa/ptbxl")
    if args.split != "ecgqa" and args.ecgqa is not None:
        raise UserError("--ecgqa: goes with --split ecgqa only")
    if args.min_report_words < 1:
        raise UserError("--min_report_words: must be at least 1")
    if args.limit is not None and args.limit < 1:
        raise UserError("--limit: must be at least 1")


@exit_2_on_user_error
def main(argv: list[str] | None = None) -> None:
    prepare(parse(argv))


def prepare(args: argparse.Namespace) -> bool:
    """Make the manifest; returns whether it is complete, which it is not while other ranks still work."""
    started = time.perf_counter()
    rows, counts = read_rows(args)
    root, digest = str(args.root.resolve()), hashlib.sha256()
    for row in rows:
        digest.update(json.dumps({**row, "path": row["path"].removeprefix(root)}, sort_keys=True).encode())
    said = {name: value for name, value in sorted(vars(args).items()) if isinstance(value, str | int | float | None) and name not in NOT_IDENTITY}
    arguments = {**said, "rows": digest.hexdigest()[:16]}
    with engine.claim(args.out, arguments, FILES, args) as folder:
        done, files = read_summary(args.out), check_parts(args, rows, folder, arguments)
        if done.get("arguments") == arguments and files is None:
            print(f"{args.out} is complete: {done['kept']} ECGs, same arguments and tables (--overwrite makes it again)")
            return True
        missing = [file for file in files if not file.exists()]
        if missing:
            print(f"{args.out}: rank {args.rank} is done; {len(missing)} of {len(files)} parts are still with other ranks (of {args.world_size})")
            return False
        kept, quarantine, reports = sort_out(rows, [result for file in files for result in json.loads(file.read_text())])
        if not kept:
            for file in files:
                file.unlink()  # what is wrong will be put right, and then the records must be looked at again
            first = f"{quarantine[0]['key']}, {quarantine[0]['reason']}: {quarantine[0]['message']}"
            raise UserError(f"--root {args.root}: none of {len(rows)} records can be used: look at the first ({first})")
        if len({row["key"] for row in kept}) < len(kept):
            raise UserError(f"--root {args.root}: a record is called like a window of another (KEY_w1): rename it")
        seconds = round(time.perf_counter() - started, 1)
        summary = {"arguments": arguments, "root": root, "records": len(rows), **summarise(kept, quarantine), **counts, "cleaned_reports": reports}
        engine.guarded(args.out, write_manifest, args.out, kept, quarantine, {**summary, "seconds": seconds})
    for reason, count in summary["left_out"].items():
        print(f"left out: {count} records {reason}")
    print(f"{args.out}: {summary['kept']} of {summary['ecgs']} ECGs kept, {summary['reports']} with a report, {seconds} s")
    print(summary_table(summary))
    if quarantine:
        print(f"  {args.out / QUARANTINE} lists what was left out; the first: {quarantine[0]['key']}, {quarantine[0]['message']}")
    if absent := summary["quarantined"].get(ABSENT):
        print(f"  {absent} records are in the table and not in --root: when the download is complete, run this command again")
    return True


def check_parts(args: argparse.Namespace, rows: list[dict], folder: Path, arguments: dict) -> list[Path] | None:
    """Check this rank's records; the completion files of all ranks, which hold their results, or None if there was nothing to do and all is merged.

    A part with records whose files were not there is looked at again: the download may have gone on.
    """
    starts = range(0, len(rows), PART)
    files = {start: folder / f"records-{start // PART:06d}.json" for start in starts}
    mine = engine.share(list(starts), args.rank, args.world_size)
    todo = [start for start in mine if not files[start].exists() or f'"{ABSENT}"' in files[start].read_text()]
    if not todo and all(file.exists() for file in files.values()) and read_summary(args.out).get("arguments") == arguments:
        return None
    sizes = {start: len(rows[start : start + PART]) for start in starts}
    chunks = ((start, c) for start in todo for c in range(start, start + sizes[start], CHUNK))
    work = ([(row["path"], row["array"], row["report"]) for row in rows[c : min(c + CHUNK, start + PART)]] for start, c in chunks)
    options = {"which": args.windows, "qc": args.qc, "boilerplate": not args.keep_boilerplate, "min_words": args.min_report_words}
    checked = engine.ordered_map(partial(check_records, **options), work, args.workers)
    with engine.progress(sum(sizes[s] for s in mine), sum(sizes[s] for s in mine if s not in todo), "check") as bar:
        for start in todo:
            results = []
            while len(results) < sizes[start]:
                results += (chunk := next(checked))
                bar.update(len(chunk))
            engine.sweep(folder, files[start].name)
            engine.save(files[start], json.dumps(results), args.out)
    return list(files.values())


def read_rows(args: argparse.Namespace) -> tuple[list[dict], dict]:
    """The source's rows with their splits, and what there is to count of that: `left_out` by reason, `split`."""
    source = SOURCES[args.source]
    rows = list(islice(source.rows(args.root, args), args.limit))
    left_out = Counter(row["left_out"] for row in rows if "left_out" in row)
    rows = [row for row in rows if "left_out" not in row]
    if not rows:
        raise UserError(f"--root {args.root}: the {args.source} dataset there has no rows{f' but {dict(left_out)}' * bool(left_out)}: download it again")
    key, times = Counter(row["key"] for row in rows).most_common(1)[0]
    if times > 1:
        raise UserError(f"--root {args.root}: {times} rows are called {key}: remove the duplicates")
    if wrong := next((row["key"] for row in rows if not KEY.fullmatch(row["key"] + "_w00000")), None):
        raise UserError(f"--root {args.root}: a record cannot be called {wrong!r}: at most 85 letters, digits, '_' and '-'")
    without = sum(row["split"] == "" for row in rows)
    if source.OWN_SPLIT and not args.split and 0 < without < len(rows):
        raise UserError(f"--split: {without} of {len(rows)} records have no split of their own; fill it in, or say --split hash")
    own = source.OWN_SPLIT if not without else None
    return rows, {"left_out": dict(left_out), "split": assign(rows, args.split or own or "hash", source.OWN_SPLIT, ecgqa=args.ecgqa, salt=args.split_salt)}


def check_records(records: list[tuple[str, str, str]], which: str, qc: str, boilerplate: bool, min_words: int) -> list[list]:
    """Per record (path, array, report) its clean report and its windows, each [start, flags, reason, message]; reason is '' for one that passes."""
    return [[clean(report, boilerplate=boilerplate, min_words=min_words), check_record(path, array, which, qc)] for path, array, report in records]


def check_record(path: str, array: str, which: str, qc: str) -> list[list]:
    try:
        starts = windows(path, which, array)
    except RecordError as error:
        return [[0.0, [], error.reason, error.message]]
    except OSError as error:
        raise machine_fault(error) from error
    checked = []
    for start in starts:
        try:
            checked.append([start, read_checked(path, start, array, qc)[1], "", ""])
        except RecordError as error:
            checked.append([start, [], error.reason, error.message])
        except OSError as error:
            raise machine_fault(error) from error
    return checked


def machine_fault(error: OSError) -> UserError:
    """Not a fault of the record, which must not be quarantined for it."""
    return UserError(f"--root: a record cannot be read ({error.strerror}): mend that and run the same command again, it goes on from here")


def sort_out(rows: list[dict], results: list[list]) -> tuple[list[dict], list[dict], dict]:
    """The manifest's rows, the lines of the quarantine, and what cleaning did to reports. The n-th window after the first is called KEY_wN."""
    kept, quarantine, reports = [], [], {"changed": 0, "emptied": 0}
    for row, (report, checked) in zip(rows, results, strict=True):
        before = row["report"].split()
        reports["emptied" if before and not report else "changed"] += before != report.split()
        for n, (start, flags, reason, message) in enumerate(checked):
            key = f"{row['key']}_w{n}" if n else row["key"]
            if reason:
                quarantine.append({"key": key, "path": row["path"], "start": start, "reason": reason, "message": message})
            else:
                kept.append({**row, "key": key, "start": start, "report": report, "qc": flags})
    return kept, quarantine, reports


if __name__ == "__main__":
    main()

"""Check shards byte by byte, and check that no patient is in two splits.

    python -m sharding.verify shards runs/demo/shards                       # every tar read member by member; names each bad shard and the mend
    python -m sharding.verify leak --shards runs/demo/shards runs/demo/tasks
    python -m sharding.verify leak --shards A/shards B/tasks C/manifest --json     # every patient found, for scripts

Exit code 0: all good, 1: something is wrong, 2: a wrong argument. `leak` takes token shards, task shards and manifests (`sharding.prepare`) together;
a patient is known by the pseudonym of its dataset, so one patient in two datasets is not recognised.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
from tqdm import tqdm

from sharding.manifest import MANIFEST
from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.shards.reader import Shards, how_to_mend, read_index
from toolkit.shards.verify import check_shard, check_split, fault
from toolkit.tokenizer.tokenizer import ECGTokenizer

SHOWN = 20  # patients; a leak is mostly of many
CHUNK = 32_768  # samples a process reads at a time; opening the shards for it takes 20 ms
FAULTS = 5  # shown of one shard: if its size is wrong, all that follows is


def parse(argv: list[str] | None) -> argparse.Namespace:
    raw = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("python -m sharding.verify", **raw)
    commands = parser.add_subparsers(dest="command", required=True)
    shards = commands.add_parser("shards", help="compare a folder of shards with its index, byte by byte", **raw)
    shards.add_argument("folder", help="token or task shards")
    leak = commands.add_parser("leak", help="look for patients in two splits", **raw)
    leak.add_argument("--shards", nargs="+", required=True, metavar="FOLDER", help="token shards, task shards, manifests; any number together")
    leak.add_argument("--all", action="store_true", help=f"print every patient, not only {SHOWN}")
    leak.add_argument("--json", action="store_true", help="print everything as one JSON object")
    for command in (shards, leak):
        command.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise UserError("--workers must be at least 1")
    return args


def verify_shards(folder: str, workers: int) -> bool:
    """Print what is wrong with a folder of shards, or its totals; True if all is good."""
    if "://" in folder:
        raise UserError(f"{folder}: is a URL; copy it here first (shards that are read from a URL are checked as they are copied)")
    folder, index = Path(folder), read_index(folder, "shards")
    faults: dict[str, list[str]] = {}
    jobs = [(split, number, entry) for split in index["splits"] for number, entry in enumerate(index["splits"][split]["shards"])]
    place = {}
    for split in index["splits"]:
        faults[f"{split}.index.npy"] = check_split(folder, split, index)
    with ProcessPoolExecutor(max(1, min(workers, len(jobs)))) as pool:
        results = [pool.submit(check_shard, folder, split, index, number) for split, number, _ in jobs]
        for (_, _, entry), result in zip(jobs, tqdm(results, unit=" shards", disable=None)):
            wrong, keys = result.result()
            twice = [(key, place[key]) for key in keys if place.setdefault(key, entry["name"]) != entry["name"]]
            faults[entry["name"]] = wrong + [f"key {key} is in {other} as well" for key, other in twice]
            if len(set(keys)) < len(keys):
                faults[entry["name"]].append("repeats a key")
    faults["index.json"] = _tokenizer_faults(folder, index)
    known = {entry["name"] for _, _, entry in jobs}
    stray = sorted(path.name for path in folder.glob("*.tar") if path.name not in known)
    for name in stray:
        print(f"note: {folder / name} is not in index.json and never read")
    for split, entry in index["splits"].items():
        bad = sum(bool(faults[shard["name"]]) for shard in entry["shards"])
        size = sum(shard["bytes"] for shard in entry["shards"])
        print(f"{split}: {len(entry['shards'])} shards, {entry['samples']:,} samples, {entry['tokens']:,} tokens, {size / 1e6:,.1f} MB; {bad} bad")
    faults = {name: wrong for name, wrong in faults.items() if wrong}
    for name, wrong in faults.items():
        more = f" (and {len(wrong) - FAULTS:,} more)" if len(wrong) > FAULTS else ""
        print(f"{folder / name}: {'; '.join(wrong[:FAULTS])}{more}. Mend: {how_to_mend(index['kind'], name)}")
    if not faults:
        print(f"{folder}: all good, tokenizer {index.get('tokenizer')}")
    return not faults


def _tokenizer_faults(folder: Path, index: dict) -> list[str]:
    """tokenizer/ against index.json."""
    wrong = [f"tokenizer/{name} {text}" for name, file in index.get("tokenizer_files", {}).items() if (text := fault(folder / "tokenizer" / name, file))]
    if "tokenizer" in index and not wrong:
        try:
            fingerprint = ECGTokenizer.from_pretrained(folder / "tokenizer", "tokenizer/").fingerprint()
        except UserError as error:
            return [str(error)]
        if fingerprint != index["tokenizer"]:
            wrong.append(f"tokenizer/ has fingerprint {fingerprint}, the ids were made by {index['tokenizer']}")
    return wrong


def sample_patients(folder: str, split: str, start: int, end: int) -> list[tuple[str, str, str]]:
    """(patient, source, record id) of each ECG of the samples [start, end) of shards."""
    shards, found = Shards.open(folder, split), []
    for i in range(start, end):
        meta = shards.meta(i)
        try:
            patients, records = (meta["patients"], meta["record_ids"]) if "patients" in meta else ([meta["patient"]], [meta["record_id"]])
            found += [(patient, meta["source"], record) for patient, record in zip(patients, records, strict=True)]
        except (KeyError, ValueError):
            name = f"{folder}/{shards.shard_of(i)['name']}"
            raise UserError(f"--shards: {name}: {shards.key(i)} does not say its patient; `python -m sharding.verify shards {folder}`") from None
    return found


def manifest_patients(folder: str) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """(split, [(patient, source, record id), ...]) of a manifest."""
    columns = ["split", "patient", "source", "record_id"]
    try:
        table = pq.ParquetFile(Path(folder) / MANIFEST).read(columns=columns)
        split, *ecg = (table[name].to_pylist() for name in columns)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"--shards: {folder}/{MANIFEST} cannot be read ({error}); make it again with `python -m sharding.prepare`") from error
    by_split = defaultdict(list)
    for name, *one in zip(split, *ecg):
        by_split[name].append(tuple(one))
    return list(by_split.items())


def find_leak(folders: list[str], workers: int) -> dict:
    """Every patient in two splits: {patient: {split: {folder: samples}}}, with counts; ECGs are distinct (source, record id)."""
    where = defaultdict(lambda: defaultdict(lambda: defaultdict(int)))  # patient -> split -> folder -> samples
    ecgs = defaultdict(set)

    def count(folder: str, split: str, found: list[tuple[str, str, str]]) -> None:
        for patient, source, record in found:
            where[patient][split][folder] += 1
            ecgs[patient].add((source, record))

    jobs = []
    for folder in dict.fromkeys(folders):
        if (Path(folder) / MANIFEST).is_file():
            for split, found in manifest_patients(folder):
                count(folder, split, found)
        else:
            index = read_index(folder, mend="name folders of shards or manifests")
            sizes = {split: entry["samples"] for split, entry in index["splits"].items()}
            jobs += [(folder, split, i, min(i + CHUNK, n)) for split, n in sizes.items() for i in range(0, n, CHUNK)]
    with ProcessPoolExecutor(max(1, min(workers, len(jobs)))) as pool:
        results = [pool.submit(sample_patients, *job) for job in jobs]
        for (folder, split, _, _), result in zip(jobs, tqdm(results, unit=" parts", disable=None)):
            count(folder, split, result.result())
    leaking = {patient: {split: dict(places) for split, places in splits.items()} for patient, splits in sorted(where.items()) if len(splits) > 1}
    concerned = set().union(*(ecgs[patient] for patient in leaking)) if leaking else set()
    total = len(set().union(*ecgs.values())) if ecgs else 0
    return {"patients": len(where), "ecgs": total, "leaking_patients": len(leaking), "leaking_ecgs": len(concerned), "leaking": leaking}


def verify_leak(args: argparse.Namespace) -> bool:
    """Print the patients in two splits, or the counts; True if there are none."""
    leak = find_leak(args.shards, args.workers)
    if args.json:
        print(json.dumps(leak, indent=1))
        return not leak["leaking"]
    patients, ecgs = f"{leak['patients']:,} patients", f"{leak['ecgs']:,} ECGs"
    if not leak["leaking"]:
        print(f"no patient is in two splits: {patients}, {ecgs}, {len(args.shards)} folders")
        return True
    print(f"{leak['leaking_patients']:,} of {patients} are in two splits, {leak['leaking_ecgs']:,} of {ecgs} are theirs")
    shown = list(leak["leaking"].items())[: None if args.all else SHOWN]
    for patient, splits in shown:
        places = "; ".join(f"{split}: " + ", ".join(f"{folder} {n}" for folder, n in folders.items()) for split, folders in sorted(splits.items()))
        print(f"{patient}  {places}")
    if len(shown) < leak["leaking_patients"]:
        print(f"and {leak['leaking_patients'] - len(shown):,} more (--all prints them)")
    return False


@exit_2_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    good = verify_shards(args.folder, args.workers) if args.command == "shards" else verify_leak(args)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

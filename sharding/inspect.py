"""Look at one sample of token or task shards: its place, ids and json, and its ECG as the tokens keep it.

    python -m sharding.inspect runs/demo/shards                                      # what the folder holds, and its first sample
    python -m sharding.inspect runs/demo/shards --key ptbxl_00017 --out 17.png
    python -m sharding.inspect runs/demo/tasks --split valid --index 17 --out 17.png

The drawing is decoded from the tokens by the tokenizer beside the shards. Where the manifest and its recordings are at hand, the recording is drawn with
it; otherwise the reconstruction stands alone, in mV by the gains in the json, each lead about its mean. Two ECGs of a comparison are drawn below each
other.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from sharding.manifest import MANIFEST
from toolkit.ecg.gains import gain_text
from toolkit.ecg.plot import draw_ecg
from toolkit.ecg.quality import read_checked
from toolkit.ecg.records import RecordError
from toolkit.errors import UserError, exit_2_on_user_error
from toolkit.evaluation.cards import millivolts, tokenizer_of
from toolkit.shards.reader import Shards, locate
from toolkit.shards.remote import CACHE, CACHE_GB

SHOWN = 12  # ids


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m sharding.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="token or task shards: a folder or a URL")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--key", help="the sample with this key, in whatever split")
    which.add_argument("--index", type=int, help="the sample at this place of --split, from 0")
    parser.add_argument("--split", help="split of --index, or the only one to look for --key in (default: the first that has samples)")
    parser.add_argument("--out", type=Path, help="draw the ECG to this .png")
    parser.add_argument("--shard_cache", default=CACHE, help="folder for copies of the shards of a URL (default: %(default)s)")
    return parser.parse_args(argv)


def choose(args: argparse.Namespace, index: dict) -> tuple[Shards, int]:
    """The split and the place in it of the sample that the arguments name."""
    filled = [split for split, entry in index["splits"].items() if entry["samples"]]
    if not filled:
        raise UserError(f"{args.folder}: has no samples")
    splits = [args.split] if args.split else filled if args.key else filled[:1]
    for split in splits:
        shards = Shards.open(args.folder, split, "FOLDER", cache=args.shard_cache, cache_gb=CACHE_GB)
        i = shards.find(args.key) if args.key else args.index or 0
        if i is not None:
            if not 0 <= i < len(shards):
                raise UserError(f"--index {i}: {split} has the samples 0 to {len(shards) - 1}")
            return shards, i
    raise UserError(f"--key {args.key}: not in {', '.join(splits)} of {args.folder}; the first key is {shards.key(0)}")


def recordings(manifest: Path, key: str, meta: dict) -> list[np.ndarray | None]:
    """The recording float32 [12, 5000] mV of each ECG of a sample, None where it or the manifest is not at hand."""
    ids = meta.get("record_ids") or [meta["record_id"]]
    columns = ["key", "source", "record_id", "path", "start", "array"]
    try:
        table = pq.ParquetFile(manifest / MANIFEST).read(columns=columns)
    except (OSError, pa.ArrowException):
        return [None] * len(ids)
    if set(columns) - set(table.column_names):  # of another format version
        return [None] * len(ids)
    found = []
    for record in ids:
        if "record_ids" in meta:  # a task knows its ECGs by dataset and number
            rows = table.filter(pc.and_(pc.equal(table["record_id"], record), pc.equal(table["source"], meta["source"]))).to_pylist()
        else:  # a long record has several keys
            rows = table.filter(pc.equal(table["key"], key)).to_pylist()
        try:
            found.append(read_checked(rows[0]["path"], rows[0]["start"], rows[0]["array"], "flag")[0] if rows else None)
        except RecordError:
            found.append(None)
    return found


def draw(shards: Shards, i: int, out: Path) -> str:
    """Draw the ECGs of sample i to `out`; returns what was drawn, for people."""
    meta, pages = shards.meta(i), []
    tokenizer = tokenizer_of(shards)
    reconstructions = tokenizer.decode(shards.ids(i))  # z-scores of each lead
    found = recordings(shards.folder / shards.index.get("manifest", ""), shards.key(i), meta)
    for number, (z, gains, ecg) in enumerate(zip(reconstructions, meta["gains"], found, strict=True), 1):
        picture = io.BytesIO()
        title = shards.key(i) + (f", ECG {number}" if len(found) > 1 else "")
        if ecg is None:
            draw_ecg(z * np.array(gains)[:, None], picture, title=title)
        else:
            draw_ecg(ecg, picture, title=title, reconstruction=millivolts(tokenizer, z, ecg))
        pages.append(Image.open(picture).convert("RGB"))
    whole = Image.new("RGB", (pages[0].width, sum(page.height for page in pages)))
    for number, page in enumerate(pages):
        whole.paste(page, (0, number * page.height))
    try:
        whole.save(out, "PNG")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    at_hand = sum(ecg is not None for ecg in found)
    return f"{out}: {len(found)} ECG, " + ("recording and reconstruction" if at_hand == len(found) else f"the recording of {at_hand} at hand")


def summary(index: dict) -> str:
    """What a folder holds, as lines."""
    lines = [f"{index['kind']}, tokenizer {index.get('tokenizer')}, {index.get('codes')} codes, manifest {index.get('manifest')}"]
    for split, entry in index["splits"].items():
        size = sum(shard["bytes"] for shard in entry["shards"]) / 1e6
        tasks = "".join(f", {count:,} {kind}" for kind, count in entry.get("tasks", {}).items())
        lines.append(f"{split}: {entry['samples']:,} samples, {entry['tokens']:,} tokens, {len(entry['shards'])} shards, {size:,.1f} MB{tasks}")
    return "\n".join(lines)


@exit_2_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    index = locate(args.folder, "FOLDER", args.shard_cache)[2]
    if args.key is None and args.index is None:
        print(summary(index) + "\n")
    shards, i = choose(args, index)
    ids, row = shards.ids(i), shards.rows[i]
    print(f"key    {shards.key(i)}")
    print(f"split  {shards.split}, sample {i} of {len(shards):,}")
    print(f"shard  {shards.shard_of(i)['name']}, ids at byte {row['ids_offset']:,}, json at byte {row['json_offset']:,}")
    for ecg in ids:
        print(f"ids    {ids.dtype} {list(ids.shape)}: {' '.join(map(str, ecg[:SHOWN]))} ...")
    meta = shards.meta(i)
    print(gain_text(meta["gains"]))
    if args.out:
        print(draw(shards, i, args.out))
    print(json.dumps(meta, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()

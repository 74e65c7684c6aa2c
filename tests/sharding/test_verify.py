"""`sharding.verify` on damage of every sort and on made-up leaks, `sharding.inspect` on what it must show."""

import json
import re
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sharding.inspect
import sharding.verify
from sharding.manifest import SCHEMA
from toolkit.shards.reader import Shards
from toolkit.shards.verify import check_shard, find_bad
from toolkit.shards.writer import join_shards, sha256_of, write_index, write_shard, write_split
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig


def ecg(i, split, patient=None, key=None):
    meta = {"source": "made", "record_id": str(i), "patient": patient or f"p{i // 2}", "split": split, "report": "Überleitung ✓", "labels": ["NORM"]}
    meta["gains"] = [[0.1 + i / 100] * 12]
    return key or f"made_{i:04d}", np.random.default_rng(i).integers(0, 1296, (1, 313)).astype(np.uint16), meta


def tasks(i, j, split, patients):
    ids = np.concatenate([ecg(k, split)[1] for k in (i, j)])
    meta = {"source": "made", "record_ids": [str(i), str(j)], "patients": patients, "split": split, "tasks": [{"task": "ecgqa", "question": "?"}]}
    meta["gains"] = [[0.1] * 12, [0.2] * 12]
    return f"made_{i}_{j}", ids, meta


def write(folder, kind="tokens", manifest="", **splits):
    folder.mkdir(exist_ok=True)
    tokenizer = ECGTokenizer(TokenizerConfig())
    tokenizer.save_pretrained(folder / "tokenizer")
    entries = {split: write_split(folder, split, samples, 4) for split, samples in splits.items()}
    write_index(folder, entries, kind=kind, codes=1296, tokens_per_ecg=313, tokenizer=tokenizer.fingerprint(), manifest=str(manifest))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "s", train=[ecg(i, "train") for i in range(10)], valid=[ecg(i, "valid") for i in range(10, 14)], test=[])


def run(main, *words, capsys):
    """(exit code, stdout) of an entry; 0 if it returns."""
    try:
        code = main(list(map(str, words))) or 0
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return code, out.out + out.err


def verify(folder, capsys):
    return run(sharding.verify.main, "shards", folder, "--workers", 1, capsys=capsys)


def test_good_shards(folder, capsys):
    code, out = verify(folder, capsys)
    assert code == 0 and "all good" in out and "train: 3 shards, 10 samples, 3,130 tokens" in out


def damage_tar(change):
    def damage(folder):
        path = folder / "train-000001.tar"
        data = bytearray(path.read_bytes())
        change(data, np.load(folder / "train.index.npy")[5])
        path.write_bytes(data)

    return damage


def reseal(folder):
    """Make index.json believe the damaged tars: what is left must be found by reading them."""
    index = json.loads((folder / "index.json").read_text())
    for shard in index["splits"]["train"]["shards"]:
        shard |= {"sha256": sha256_of(folder / shard["name"]), "bytes": (folder / shard["name"]).stat().st_size}
    index["splits"]["train"]["index_sha256"] = sha256_of(folder / "train.index.npy")
    (folder / "index.json").write_text(json.dumps(index))


def set_bytes(column, shift, new):
    return damage_tar(lambda data, row: data.__setitem__(slice(int(row[column]) + shift, int(row[column]) + shift + len(new)), new))


def rename(new):
    """Another name in the header of a json member, with the header's checksum."""

    def change(data, row):
        start = int(row["json_offset"]) - tarfile.BLOCKSIZE
        data[start : start + 100] = new.ljust(100, b"\0")
        checksum = tarfile.calc_chksums(bytes(data[start : start + tarfile.BLOCKSIZE]))[0]
        data[start + 148 : start + 156] = b"%06o\0 " % checksum

    return damage_tar(change)


def rewrite(**changes):
    """Another shard 1, made by the writer itself, with index rows and entry to match or not."""

    def damage(folder):
        samples = [ecg(i, changes.get("split", "train"), key=changes.get("key") if i == 7 else None) for i in range(4, 8)]
        if "gains" in changes:
            samples[2][2]["gains"] = changes["gains"]
        if changes.get("short"):
            samples = [(key, ids[:, :300], meta) for key, ids, meta in samples]
        entry, rows = write_shard(folder, "train-000001.tar", samples)
        index, old = json.loads((folder / "index.json").read_text()), np.load(folder / "train.index.npy")
        parts = [(shard, old[4 * i : 4 * i + 4]) for i, shard in enumerate(index["splits"]["train"]["shards"])]
        parts[1] = (entry, rows)
        index["splits"]["train"] = join_shards(folder, "train", parts)
        (folder / "index.json").write_text(json.dumps(index))

    return damage


def swap_rows(folder):
    rows = np.load(folder / "train.index.npy")
    rows[[4, 5]] = rows[[5, 4]]
    np.save(folder / "train.index.npy", rows)


def count_wrongly(folder):
    index = json.loads((folder / "index.json").read_text())
    index["splits"]["train"]["tokens"] += 1
    index["splits"]["train"]["shards"][1]["tokens"] += 1
    (folder / "index.json").write_text(json.dumps(index))


def link_member(folder):
    with tarfile.open(folder / "train-000001.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("made_0004.ecg.npy", "made_0004.json"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(member)


READ = {  # found by reading the tar, its sha256 being right
    "a token id too large": (set_bytes("ids_offset", 101, b"\xff"), "made_0005: token id .* is not below 1296"),
    "json that does not parse": (set_bytes("json_offset", 0, b" "), "does not read .JSONDecodeError"),
    "a damaged header": (set_bytes("json_offset", -512, b"Made"), "does not read .ValueError: 'made_0005.ecg.npy' has no partner"),
    "a member renamed": (rename(b"made_0006.json"), "members 'made_0005.ecg.npy' and 'made_0006.json' are no sample"),
    "an unsafe name": (rename(b"../made_0005.json"), "'../made_0005.json' are no sample"),
    "a link": (link_member, "is no plain file"),
    "rows in another order": (swap_rows, "differs from its rows in train.index.npy"),
    "a split that is not its own": (rewrite(split="test"), "its json says split 'test'"),
    "a key of another shard": (rewrite(key="made_0001"), "key made_0001 is in train-000000.tar as well"),
    "too few tokens": (rewrite(short=True), "300 tokens an ECG, not 313"),
    "no gains": (rewrite(gains=[]), "made_0006: its gains are not 1 times 12 amplitudes"),
    "a lead too few": (rewrite(gains=[[0.1] * 11]), "made_0006: its gains are not 1 times 12 amplitudes"),
    "a gain of zero": (rewrite(gains=[[0.1] * 11 + [0]]), "made_0006: its gains are not 1 times 12 amplitudes"),
    "wrong counts": (count_wrongly, "has 4 samples and 1,252 tokens, not 4 and 1,253"),
}


@pytest.mark.parametrize("name", READ)
def test_what_the_sha256_does_not_show_is_found_by_reading(folder, name, capsys):
    damage, message = READ[name]
    damage(folder)
    reseal(folder)
    code, out = verify(folder, capsys)
    lines = [line for line in out.splitlines() if "Mend:" in line]
    assert code == 1 and len(lines) == 1 and "train-000001.tar" in lines[0] and "delete it and run the same `python -m sharding.shard`" in lines[0]
    assert re.search(message, lines[0]), lines


SEEN = {
    "missing": (lambda f: (f / "train-000002.tar").unlink(), "train-000002.tar: is missing"),
    "cut short": (lambda f: (f / "train-000002.tar").write_bytes((f / "train-000002.tar").read_bytes()[:2000]), "train-000002.tar: has 2,000 bytes"),
    "empty": (lambda f: (f / "train-000002.tar").write_bytes(b""), "train-000002.tar: has 0 bytes"),
    "index": (lambda f: (f / "valid.index.npy").write_bytes(b"x"), "valid.index.npy: .*does not load"),
    "tokenizer": (lambda f: ECGTokenizer(TokenizerConfig()).save_pretrained(f / "tokenizer"), "tokenizer/config.json has"),
    "no tokenizer": (lambda f: (f / "tokenizer" / "model.safetensors").unlink(), "model.safetensors is missing"),
}


@pytest.mark.parametrize("name", SEEN)
def test_damaged_files_are_named(folder, name, capsys):
    damage, message = SEEN[name]
    damage(folder)
    code, out = verify(folder, capsys)
    assert code == 1 and re.search(message, out) and "Mend: " in out and "all good" not in out


def test_every_bad_shard_is_named_at_once(folder, capsys):
    (folder / "train-000000.tar").unlink()
    set_bytes("ids_offset", 1, b"\xff")(folder)
    (folder / "valid-000000.tar").write_bytes(b"")
    (folder / "train-000009.tar").write_bytes(b"")
    code, out = verify(folder, capsys)
    assert code == 1 and [line.split(":")[0].split("/")[-1] for line in out.splitlines() if "Mend" in line] == [
        "train-000000.tar", "train-000001.tar", "valid-000000.tar",
    ]  # fmt: skip
    assert "train: 3 shards" in out and "2 bad" in out and "train-000009.tar is not in index.json" in out


@pytest.fixture(scope="module")
def one_shard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flips")
    index = {"codes": 1296, "tokens_per_ecg": 313, "kind": "tokens"}
    write_index(folder, {"train": write_split(folder, "train", [ecg(i, "train") for i in range(4)], 4)}, **index)
    return folder, (folder / "train-000000.tar").read_bytes()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_flipped_or_lost_bytes_are_found(one_shard, data):
    folder, good = one_shard
    bad = bytearray(good)
    for place in data.draw(st.lists(st.integers(0, len(good) - 1), min_size=1, max_size=3, unique=True)):
        bad[place] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        bad = bad[: data.draw(st.integers(0, len(bad) - 1))]
    (folder / "train-000000.tar").write_bytes(bad)
    index = json.loads((folder / "index.json").read_text())
    assert check_shard(folder, "train", index, 0)[0]
    assert find_bad(folder, "train", 0, 1) == ["train-000000.tar"]
    (folder / "train-000000.tar").write_bytes(good)
    assert check_shard(folder, "train", index, 0) == ([], [f"made_{i:04d}" for i in range(4)]) and find_bad(folder, "train", 0, 1) == []


def test_parts_of_find_bad_tile_the_shards(folder):
    for name in ("train-000000.tar", "train-000002.tar"):
        (folder / name).unlink()
    assert sorted(name for part in range(2) for name in find_bad(folder, "train", part, 2)) == ["train-000000.tar", "train-000002.tar"]
    assert find_bad(folder, "valid", 0, 1) == find_bad(folder, "test", 0, 1) == find_bad(folder, "train", 5, 9) == []


def write_manifest(folder, rows):
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist([{"split": s, "patient": p, "source": "made", "record_id": r} for s, p, r in rows], schema=SCHEMA),
                   folder / "manifest.parquet")  # fmt: skip
    return folder


def test_leak_over_tokens_tasks_and_manifests(tmp_path, capsys):
    tokens = write(tmp_path / "tokens", train=[ecg(i, "train") for i in range(6)], test=[ecg(6, "test"), ecg(7, "test")])  # p0 p1 p2 | p3
    good = write(tmp_path / "good", "tasks", train=[tasks(0, 2, "train", ["p0", "p1"])])
    bad = write(tmp_path / "bad", "tasks", train=[tasks(4, 6, "train", ["p2", "p3"])], valid=[tasks(8, 4, "valid", ["p4", "p2"])])
    manifest = write_manifest(tmp_path / "m", [("train", "p0", "0"), ("test", "p0", "77"), ("test", "p9", "99")])

    def leak(*words):
        return run(sharding.verify.main, "leak", *words, "--workers", 1, capsys=capsys)

    code, out = leak("--shards", tokens, good)
    assert code == 0 and out.strip() == "no patient is in two splits: 4 patients, 8 ECGs, 2 folders"
    code, out = leak("--shards", tokens, bad)
    assert code == 1 and "2 of 5 patients are in two splits, 4 of 9 ECGs are theirs" in out
    lines = out.splitlines()
    assert f"p2  train: {tokens} 2, {bad} 1; valid: {bad} 1" in lines and f"p3  test: {tokens} 2; train: {bad} 1" in lines and len(lines) == 3
    code, out = leak("--shards", manifest, tokens, "--json")
    found = json.loads(out)
    assert code == 1 and found == {
        "patients": 5, "ecgs": 10, "leaking_patients": 1, "leaking_ecgs": 3,
        "leaking": {"p0": {"train": {str(manifest): 1, str(tokens): 2}, "test": {str(manifest): 1}}},
    }  # fmt: skip
    assert leak("--shards", write_manifest(tmp_path / "m2", []))[0] == 0


def test_leak_prints_twenty_patients_unless_all_are_asked_for(tmp_path, capsys):
    rows = [(split, f"p{i:02d}", f"{i}{split}") for i in range(30) for split in ("train", "test")]
    manifest = write_manifest(tmp_path / "m", rows)
    for words, lines in (((), 22), (("--all",), 31)):
        code, out = run(sharding.verify.main, "leak", "--shards", manifest, *words, capsys=capsys)
        assert code == 1 and len(out.splitlines()) == lines


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.sampled_from(["train", "valid", "test"])), min_size=1, max_size=30))
def test_leak_equals_the_obvious_sets(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("leak")
    splits = {split: [ecg(i, split, f"p{patient}") for i, (patient, s) in enumerate(drawn) if s == split] for split in ("train", "valid", "test")}
    entries = {split: write_split(folder, split, samples, 3) for split, samples in splits.items()}
    write_index(folder, entries, kind="tokens")
    found = sharding.verify.find_leak([str(folder)], 1)
    both = {p for p, _ in drawn if len({s for q, s in drawn if q == p}) > 1}
    assert set(found["leaking"]) == {f"p{p}" for p in both}
    assert found["leaking_ecgs"] == sum(p in both for p, _ in drawn) and found["ecgs"] == len(drawn)


def test_mistakes_exit_2(folder, tmp_path, capsys):
    for words in (["shards", tmp_path], ["leak", "--shards", tmp_path], ["shards", "s3://bucket/x"], ["shards", folder, "--workers", "0"], ["shards"], []):
        assert run(sharding.verify.main, *words, capsys=capsys)[0] == 2, words


def inspect(*words, capsys):
    return run(sharding.inspect.main, *words, capsys=capsys)


def test_inspect_shows_a_sample(folder, capsys):
    key, ids, meta = ecg(7, "train")
    code, out = inspect(folder, "--key", key, capsys=capsys)
    assert code == 0 and "train, sample 7 of 10" in out and "train-000001.tar" in out and " ".join(map(str, ids[0, :12])) in out
    assert "Lead amplitudes (SD, mV): I 0.17, II 0.17, III 0.17, aVR" in out
    assert json.loads(out[out.index("{") :]) == meta
    assert inspect(folder, "--index", 7, capsys=capsys) == (0, out) == inspect(folder, "--index", 7, "--split", "train", capsys=capsys)
    code, out = inspect(folder, capsys=capsys)
    assert code == 0 and "valid: 4 samples" in out and "made_0000" in out
    assert "valid, sample 1 of 4" in inspect(folder, "--key", "made_0011", capsys=capsys)[1]


def test_inspect_draws_reconstruction_and_recording(tmp_path, capsys):
    recording = tmp_path / "7.npy"
    np.save(recording, np.sin(np.arange(5000) / 40) + np.random.default_rng(0).normal(0, 0.05, (12, 5000)))
    array = json.dumps({"sampling_rate": 500, "unit": "mV", "leads": ["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]})
    row = {"key": "made_0007", "source": "made", "record_id": "7", "path": str(recording), "start": 0.0, "array": array}
    (tmp_path / "m").mkdir()
    pq.write_table(pa.Table.from_pylist([row], schema=SCHEMA), tmp_path / "m" / "manifest.parquet")
    pair = write(tmp_path / "pair", "tasks", tmp_path / "m", train=[tasks(7, 8, "train", ["a", "b"])])
    alone = write(tmp_path / "alone", manifest=tmp_path / "m", train=[ecg(7, "train")])
    nowhere = write(tmp_path / "nowhere", manifest=tmp_path / "gone", train=[ecg(7, "train")])
    key, ids, meta = ecg(7, "train")
    louder = write(tmp_path / "louder", train=[(key, ids, {**meta, "gains": [[2.0] * 12]})])
    said = [inspect(folder, "--out", tmp_path / f"{folder.name}.png", capsys=capsys) for folder in (pair, alone, nowhere, louder)]
    assert [code for code, _ in said] == [0, 0, 0, 0], said
    assert "2 ECG, the recording of 1 at hand" in said[0][1] and "recording and reconstruction" in said[1][1] and "recording of 0 at hand" in said[2][1]
    sizes = [Image.open(tmp_path / f"{name}.png").size for name in ("pair", "alone", "nowhere")]
    assert sizes[1] == sizes[2] == (sizes[0][0], sizes[0][1] // 2)
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in ("alone", "nowhere", "louder")}) == 3  # the gains are in the drawing


def test_inspect_names_mistakes(folder, tmp_path, capsys):
    for words, message in (
        ([tmp_path], "has no index.json"),
        ([folder, "--key", "nobody"], "--key nobody: not in train, valid"),
        ([folder, "--index", "10"], "--index 10: train has the samples 0 to 9"),
        ([folder, "--index", "-1"], "--index -1"),
        ([folder, "--split", "test"], "no samples in split 'test'"),
        ([folder, "--out", tmp_path / "no" / "x.png"], "--out .* cannot be written"),
    ):
        code, out = inspect(*words, capsys=capsys)
        assert code == 2 and re.search(message, out), out


def test_a_token_shard_is_found_by_key_in_few_reads(tmp_path, monkeypatch):
    folder = write(tmp_path / "s", train=[ecg(i, "train") for i in range(200)])
    shards, reads = Shards.open(folder, "train"), []
    monkeypatch.setattr(shards, "key", lambda i, key=shards.key: reads.append(i) or key(i))
    assert shards.find("made_0137") == 137 and len(reads) <= 9  # log2(200) and one to be sure

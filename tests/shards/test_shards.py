"""The on-disk format against `tarfile` and `webdataset`, and the arithmetic of the global order."""

import json
import shutil
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import UserError
from toolkit.shards.order import micro_batches, sample_at
from toolkit.shards.reader import Shards
from toolkit.shards.statistics import unigram_entropy
from toolkit.shards.writer import write_index, write_split

SAMPLES = [
    (f"s_{i:04d}", np.random.default_rng(i).integers(0, 1296, (1 + i % 2, 313)).astype(np.uint16), {"n": i, "report": "Sinusrhythmus, Überleitung ✓"})
    for i in range(23)
]


@pytest.fixture
def folder(tmp_path):
    write_index(tmp_path, {"train": write_split(tmp_path, "train", SAMPLES, 5)}, kind="tokens", tokenizer="f" * 16)
    return tmp_path


def test_every_sample_reads_back_by_offset(folder):
    shards = Shards.open(folder, "train")
    assert len(shards) == len(SAMPLES) and len(shards.index["splits"]["train"]["shards"]) == 5
    for i in np.random.default_rng(0).permutation(len(SAMPLES)):
        key, ids, meta = SAMPLES[i]
        assert (shards.ids(i) == ids).all() and shards.ids(i).dtype == np.uint16
        assert shards.meta(i) == meta


def test_webdataset_alone_reads_the_tars(folder):
    urls = sorted(map(str, folder.glob("train-*.tar")))
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [s["__key__"] for s in read] == [key for key, _, _ in SAMPLES]
    assert all((s["ecg.npy"] == ids).all() and s["json"] == meta for s, (_, ids, meta) in zip(read, SAMPLES))


def test_bytes_depend_on_the_samples_alone(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("again")
    entry = write_split(other, "train", iter(SAMPLES), 5)
    assert entry == json.loads((folder / "index.json").read_text())["splits"]["train"]
    assert all((other / s["name"]).read_bytes() == (folder / s["name"]).read_bytes() for s in entry["shards"])
    with tarfile.open(folder / "train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.uname) for m in tar} == {(0, 0, "")}


@pytest.mark.parametrize("key", ["../x", "a/b", "a.b", "", "a b", "ü"])
def test_unsafe_keys_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match="letters, digits"):
        write_split(tmp_path, "train", [(key, SAMPLES[0][1], {})], 5)


def test_repeated_keys_and_wrong_types_are_refused(tmp_path):
    with pytest.raises(ValueError, match="twice"):
        write_split(tmp_path, "train", [SAMPLES[0], SAMPLES[0]], 5)
    with pytest.raises(ValueError, match="uint16"):
        write_split(tmp_path, "train", [("a", np.zeros((1, 313), np.int64), {})], 5)


def _truncate(folder):
    path = folder / "train-000002.tar"
    path.write_bytes(path.read_bytes()[:3000])


def _other_version(folder):
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "format_version": 99}))


def _pickled_index(folder):
    np.save(folder / "train.index.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "train-000002.tar is missing or cut short"),
        (_other_version, "format version 99"),
        (lambda f: (f / "train-000001.tar").unlink(), "train-000001.tar is missing"),
        (lambda f: (f / "index.json").write_text("{"), "damaged"),
        (lambda f: shutil.copy(f / "index.json", f / "train.index.npy"), "does not load"),
        (_pickled_index, "does not load"),
        (lambda f: (f / "index.json").unlink(), "has no index.json"),
    ],
)
def test_damage_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        Shards.open(folder, "train")


def test_an_absent_split_names_those_there_are(folder):
    with pytest.raises(UserError, match=r"'test'; it has train \(23\)"):
        Shards.open(folder, "test")


def test_opening_reads_no_row_of_the_index(folder):
    assert isinstance(Shards.open(folder, "train").rows, np.memmap)  # 800,000 rows open like 23


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 50), st.integers(0, 5))
def test_an_epoch_is_a_permutation(seed, n, epoch):
    drawn = [sample_at(seed, n, epoch * n + i) for i in range(n)]
    assert {e for e, _ in drawn} == {epoch}
    assert sorted(i for _, i in drawn) == list(range(n))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_ranks_tile_the_global_batch(cursor, micro, accumulation, world):
    positions = [p for rank in range(world) for part in micro_batches(cursor, micro, accumulation, rank, world) for p in part]
    assert sorted(positions) == list(range(cursor, cursor + micro * accumulation * world))
    one = [p for part in micro_batches(cursor, micro * accumulation * world, 1, 0, 1) for p in part]
    assert sorted(positions) == one  # another world size sees the same samples in the same step


def test_epochs_differ_and_do_not_depend_on_the_past():
    orders = [[sample_at(7, 100, e * 100 + i)[1] for i in range(100)] for e in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert sample_at(7, 100, 250) == (2, orders[2][50])


def test_unigram_entropy_by_hand(tmp_path):
    ids = [np.full((1, 4), 0, np.uint16), np.array([[0, 0, 1, 1]], np.uint16)]
    splits = {name: write_split(tmp_path, name, [("k", x, {})], 5) for name, x in zip(("train", "valid"), ids)}
    write_index(tmp_path, splits, kind="tokens")
    got = unigram_entropy(Shards.open(tmp_path, "train"), Shards.open(tmp_path, "valid"), [0], codes=3)
    assert got == pytest.approx(-0.5 * np.log(5 / 7) - 0.5 * np.log(1 / 7))

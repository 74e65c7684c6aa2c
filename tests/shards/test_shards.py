"""The on-disk format against `tarfile` and `webdataset`, and the arithmetic of the global order."""

import io
import json
import os
import resource
import shutil
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import UserError
from toolkit.shards.order import micro_batches, sample_at
from toolkit.shards.reader import OPEN_MAPS, Shards
from toolkit.shards.statistics import unigram_entropy
from toolkit.shards.writer import INDEX_DTYPE, join_shards, sha256_of, write_index, write_shard, write_split

SAMPLES = [
    (f"s_{i:04d}", np.random.default_rng(i).integers(0, 1296, (1 + i % 2, 313)).astype(np.uint16), {"n": i, "report": "Sinusrhythmus, Überleitung ✓"})
    for i in range(23)
]


@pytest.fixture
def folder(tmp_path):
    write_index(tmp_path, {"train": write_split(tmp_path, "train", SAMPLES, 5)}, kind="tokens", codes=1296)
    return tmp_path


def test_every_sample_reads_back_by_offset(folder):
    shards = Shards.open(folder, "train")
    assert len(shards) == len(SAMPLES) and len(shards.index["splits"]["train"]["shards"]) == 5
    for i in np.random.default_rng(0).permutation(len(SAMPLES)):
        key, ids, meta = SAMPLES[i]
        assert (shards.ids(i) == ids).all() and shards.ids(i).dtype == np.uint16
        assert shards.meta(i) == meta


def test_keys_are_read_and_found(folder):
    shards = Shards.open(folder, "train")
    assert [shards.key(i) for i in range(len(shards))] == [key for key, _, _ in SAMPLES]
    assert [shards.find(key) for key, _, _ in SAMPLES] == list(range(len(SAMPLES)))
    assert shards.find("s_0004a") is shards.find("") is shards.find("z") is None
    assert shards.shard_of(7)["name"] == "train-000001.tar"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text("abcXYZ019_-", min_size=1, max_size=92),
            st.lists(st.lists(st.integers(0, 65535), min_size=3, max_size=3), max_size=3),
            st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers() | st.none(), max_size=3),
        ),
        min_size=1, max_size=12, unique_by=lambda sample: sample[0],
    ),
    st.integers(1, 6),
)  # fmt: skip
def test_any_samples_read_back_in_order(tmp_path_factory, drawn, shard_size):
    folder = tmp_path_factory.mktemp("any")
    samples = [(key, np.array(ids, np.uint16).reshape(-1, 3), meta) for key, ids, meta in drawn]
    entry = write_split(folder, "train", iter(samples), shard_size)
    write_index(folder, {"train": entry}, kind="tokens")
    assert [shard["samples"] for shard in entry["shards"]] == [len(samples[i : i + shard_size]) for i in range(0, len(samples), shard_size)]
    shards = Shards.open(folder, "train")
    assert [shards.key(i) for i in range(len(shards))] == [key for key, _, _ in samples]
    for i, (key, ids, meta) in enumerate(samples):
        assert shards.find(key) == i and shards.meta(i) == meta  # in no order of key: found by scanning
        assert shards.ids(i).tolist() == ids.tolist() and shards.ids(i).shape == ids.shape


def test_shards_written_apart_join_to_the_same_folder(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("apart")
    parts = [write_shard(other, f"train-{n:06d}.tar", SAMPLES[5 * n : 5 * n + 5]) for n in reversed(range(5))][::-1]
    assert all((rows["shard"] == 0).all() and rows.dtype == INDEX_DTYPE for _, rows in parts)
    write_index(other, {"train": join_shards(other, "train", parts)}, kind="tokens", codes=1296)
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(path.name for path in other.iterdir()) and len(files) == 7
    assert all((folder / name).read_bytes() == (other / name).read_bytes() for name in files)


def test_the_index_describes_the_files(folder):
    split = json.loads((folder / "index.json").read_text())["splits"]["train"]
    assert split["index_sha256"] == sha256_of(folder / "train.index.npy")
    for shard in split["shards"]:
        assert (shard["bytes"], shard["sha256"]) == ((folder / shard["name"]).stat().st_size, sha256_of(folder / shard["name"]))
    assert (split["samples"], split["tokens"]) == (len(SAMPLES), sum(ids.size for _, ids, _ in SAMPLES))


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


def test_a_tar_has_the_bytes_that_tarfile_writes(tmp_path):
    write_shard(tmp_path, "train-000000.tar", SAMPLES[:7])
    with tarfile.open(tmp_path / "slow.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, ids, meta in SAMPLES[:7]:
            npy = io.BytesIO()
            np.save(npy, ids)
            text = json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()
            for name, data in ((f"{key}.ecg.npy", npy.getvalue()), (f"{key}.json", text)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert (tmp_path / "slow.tar").read_bytes() == (tmp_path / "train-000000.tar").read_bytes()


def test_a_failure_leaves_nothing_behind(tmp_path):
    def broken():
        yield from SAMPLES[:3]
        raise RuntimeError("the reader died")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path, "train-000000.tar", broken())
    with pytest.raises(OSError):
        write_shard(tmp_path / "nowhere", "train-000000.tar", SAMPLES)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # as a full disk: write fails half way
    try:
        with pytest.raises(OSError):
            write_shard(tmp_path, "train-000000.tar", SAMPLES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


def test_what_stood_there_survives_a_failure(folder):
    before = (folder / "train-000000.tar").read_bytes()
    with pytest.raises(ValueError, match="appears twice"):
        write_shard(folder, "train-000000.tar", [SAMPLES[0], SAMPLES[0]])
    assert (folder / "train-000000.tar").read_bytes() == before and len(list(folder.iterdir())) == 7


@pytest.mark.parametrize("key", ["../x", "a/b", "a.b", "", "a b", "ü", "x" * 93, "a\n"])
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


def _change_index(**changes):
    """Change the first shard's entry of index.json."""

    def change(folder):
        index = json.loads((folder / "index.json").read_text())
        index["splits"]["train"]["shards"][0] |= changes
        (folder / "index.json").write_text(json.dumps(index))

    return change


def _shift_offsets(folder):
    rows = np.load(folder / "train.index.npy")
    rows["ids_offset"] += 2
    np.save(folder / "train.index.npy", rows)


def _pickled_index(folder):
    np.save(folder / "train.index.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "train-000002.tar has 3,000 bytes, not 20,480; copy it again, or delete it and run the same `python -m sharding.shard`"),
        (_change_index(name="../train-000000.tar"), "damaged"),
        (_change_index(name="/etc/train-000000.tar"), "damaged"),
        (_change_index(name="train-000000.tar/../../x"), "damaged"),
        (_change_index(name="train-000000.tar\n"), "damaged"),
        (_change_index(name="train-000001.tar"), "damaged"),
        (_change_index(bytes="20480"), "damaged"),
        (_shift_offsets, "does not load .another sha256"),
        (lambda f: (f / "index.json").write_text("[1]"), "damaged"),
        (lambda f: (f / "train.index.npy").unlink(), "does not load"),
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


def test_damage_that_opening_does_not_see_is_named_when_it_is_read(folder):
    path = folder / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[np.load(folder / "train.index.npy")[5]["ids_offset"]] ^= 1  # another token id, as good as any
    path.write_bytes(data)
    shards = Shards.open(folder, "train")
    for read in (shards.ids, shards.meta, shards.key):
        with pytest.raises(UserError, match=r"train-000001.tar has another sha256 than index.json says; copy it again, or delete it"):
            read(5)
    assert (shards.ids(4) == SAMPLES[4][1]).all() and shards.meta(10) == SAMPLES[10][2]


def test_skipped_shards_are_not_even_looked_at(folder):
    (folder / "train-000003.tar").unlink()
    _truncate(folder)
    shards = Shards.open(folder, "train", skip=["train-000002.tar", "train-000003.tar"])
    left = SAMPLES[:10] + SAMPLES[20:]
    assert len(shards) == len(left)
    assert all((shards.ids(i) == ids).all() and shards.meta(i) == meta and shards.key(i) == key for i, (key, ids, meta) in enumerate(left))
    with pytest.raises(UserError, match="no samples in split 'train' beside those"):
        Shards.open(folder, "train", skip=[f"train-{n:06d}.tar" for n in range(5)])


def test_tars_are_opened_when_read_and_not_too_many_at_once(tmp_path):
    """A folder of more tars than a process may have open files."""
    samples = [(f"k{i}", np.full((1, 2), i, np.uint16), {}) for i in range(2 * OPEN_MAPS)]
    write_index(tmp_path, {"train": write_split(tmp_path, "train", samples, 1)}, kind="tokens")
    before = len(os.listdir("/proc/self/fd"))
    shards = Shards.open(tmp_path, "train")
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the index alone
    assert [int(shards.ids(i)[0, 0]) for i in range(len(shards))] == list(range(len(shards)))
    assert len(os.listdir("/proc/self/fd")) <= before + OPEN_MAPS + 1


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

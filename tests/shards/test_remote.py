"""Shards behind a URL: from memory://, file:// and a real HTTP server, whole, damaged, changed, and with a cache that is too small."""

import collections
import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

from toolkit.errors import UserError
from toolkit.evaluation.cards import tokenizer_of
from toolkit.shards.reader import Shards
from toolkit.shards.remote import Mirror
from toolkit.shards.verify import find_bad
from toolkit.shards.writer import write_index, write_split
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig

SAMPLES = [(f"s_{i:04d}", np.random.default_rng(i).integers(0, 1296, (1, 313)).astype(np.uint16), {"n": i}) for i in range(20)]
SHARD = 10_240  # bytes of a tar of 2 samples


def write(folder, samples=SAMPLES):
    folder.mkdir(exist_ok=True)
    tokenizer = ECGTokenizer(TokenizerConfig())
    tokenizer.save_pretrained(folder / "tokenizer")
    write_index(folder, {"train": write_split(folder, "train", samples, 2)}, kind="tokens", codes=1296, tokenizer=tokenizer.fingerprint())
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write(tmp_path_factory.mktemp("made"))


@pytest.fixture
def server(made, tmp_path):
    """(url, folder behind it, Counter of the GETs, {path: bytes to answer once instead})."""
    folder, gets, once = tmp_path / "served", collections.Counter(), {}
    folder.mkdir()
    for path in made.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(made)).parent.mkdir(exist_ok=True)
            (folder / path.relative_to(made)).write_bytes(path.read_bytes())

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            gets[self.path] += 1
            if self.path in once:
                data = once.pop(self.path)
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            else:
                super().do_GET()

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", folder, gets, once
    httpd.shutdown()
    httpd.server_close()


def same(shards):
    return len(shards) == len(SAMPLES) and all((shards.ids(i) == ids).all() and shards.meta(i) == meta for i, (_, ids, meta) in enumerate(SAMPLES))


def tars(cache):
    return sorted(path.name for path in cache.glob("*/*.tar"))


def flip(path):
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    return bytes(data)


def test_http_fetches_a_tar_when_its_first_sample_is_read(server, tmp_path):
    url, _, gets, _ = server
    shards = Shards.open(url + "/", "train", kind="tokens", cache=tmp_path / "cache")
    assert not tars(tmp_path / "cache") and gets["/train.index.npy"] == 1
    assert (shards.ids(7) == SAMPLES[7][1]).all() and tars(tmp_path / "cache") == ["train-000003.tar"]
    assert same(shards) and len(tars(tmp_path / "cache")) == 10
    again = Shards.open(url, "train", cache=tmp_path / "cache")
    assert same(again) and again.digest == shards.digest
    assert max(count for path, count in gets.items() if path != "/index.json") == 1, gets
    assert not list((tmp_path / "cache").rglob("*.partial"))
    assert tokenizer_of(again).fingerprint() == again.index["tokenizer"]


def test_memory_and_file_urls(made, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in made.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/bucket/shards/{path.relative_to(made)}", path.read_bytes())
    assert same(Shards.open("memory://bucket/shards", "train", cache=tmp_path / "memory"))
    assert same(Shards.open(f"file://{made}", "train", cache=tmp_path / "file"))


def test_a_damaged_remote_file_is_tried_twice_and_named(server, tmp_path):
    url, folder, gets, once = server
    shards = Shards.open(url, "train", cache=tmp_path / "cache")
    bad = flip(folder / "train-000004.tar")
    with pytest.raises(UserError, match="train-000004.tar has another sha256 than index.json says, twice"):
        shards.ids(8)
    assert gets["/train-000004.tar"] == 2 and not tars(tmp_path / "cache")
    (folder / "train-000005.tar").write_bytes(b"short")
    with pytest.raises(UserError, match="train-000005.tar has 5 bytes, not 10,240, twice"):
        shards.ids(10)
    (folder / "train-000006.tar").unlink()
    with pytest.raises(UserError, match="train-000006.tar cannot be read .FileNotFoundError"):
        shards.meta(12)
    once["/train-000007.tar"] = bad  # wrong once, right the second time
    assert (shards.ids(14) == SAMPLES[14][1]).all() and gets["/train-000007.tar"] == 2
    assert find_bad(url, "train", 0, 1, cache=tmp_path / "cache") == [f"train-{n:06d}.tar" for n in (4, 5, 6)]
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_copy_that_went_bad_in_the_cache_is_fetched_anew_by_find_bad(server, tmp_path):
    url, _, gets, _ = server
    shards = Shards.open(url, "train", cache=tmp_path / "cache")
    assert same(shards)
    flip(shards.folder / "train-000002.tar")
    flip(shards.folder / "train.index.npy")
    assert find_bad(url, "train", 0, 2, cache=tmp_path / "cache") == [] and gets["/train-000002.tar"] == 2
    assert same(Shards.open(url, "train", cache=tmp_path / "cache"))


def test_a_remote_that_changed_is_never_served_from_old_bytes(server, tmp_path):
    url, folder, _, _ = server
    old = Shards.open(url, "train", cache=tmp_path / "cache")
    assert (old.ids(0) == SAMPLES[0][1]).all()
    other = [(key, (ids + 1) % 1296, meta) for key, ids, meta in SAMPLES]
    write(folder, other)
    new = Shards.open(url, "train", cache=tmp_path / "cache")
    assert all((new.ids(i) == ids).all() for i, (_, ids, _) in enumerate(other))
    with pytest.raises(UserError, match="another sha256"):  # its other tars are gone
        old.ids(19)


def test_the_cache_keeps_its_size_and_drops_what_was_used_longest_ago(server, tmp_path):
    url, _, gets, _ = server
    cache, gb = tmp_path / "cache", 2.5 * SHARD / 1e9
    shards = Shards.open(url, "train", cache=cache, cache_gb=gb)
    for i in [*range(20), *np.random.default_rng(0).permutation(20)]:
        assert (shards.ids(i) == SAMPLES[i][1]).all() and len(tars(cache)) <= 2
    mirror = Mirror.open(url, cache, gb)
    entries = shards.index["splits"]["train"]["shards"]
    for age, name in enumerate(tars(cache)):
        os.utime(mirror.folder / name, (age, age))
    oldest, newest = tars(cache)
    mirror.fetch(oldest, 0, "")  # there already: used now, and so the newest
    other = next(entry for entry in entries if entry["name"] not in (oldest, newest))
    mirror.fetch(other["name"], other["bytes"], other["sha256"])
    assert tars(cache) == sorted([oldest, other["name"]])
    tiny = Shards.open(url, "train", cache=tmp_path / "tiny", cache_gb=0)
    assert same(tiny) and len(tars(tmp_path / "tiny")) == 1  # never less than what is being read


READER = """
import sys
from toolkit.shards.reader import Shards
url, cache, gb = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
shards = Shards.open(url, "train", cache=cache, cache_gb=float(gb))
print(*(f"{shards.meta(i)['n']}:{shards.ids(i).sum()}" for i in range(len(shards))))
"""


@pytest.mark.parametrize("gb", [1, 2.5 * SHARD / 1e9])
def test_two_processes_at_once(server, tmp_path, gb):
    url, _, gets, _ = server
    command = [sys.executable, "-c", READER, url, str(tmp_path / "cache"), str(gb)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": Path(__file__).resolve().parents[2]}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    outputs = []
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        outputs.append(process.communicate(timeout=60)[0].split())
    assert outputs == [[f"{i}:{ids.sum()}" for i, (_, ids, _) in enumerate(SAMPLES)]] * 2
    if gb == 1:  # each file once, whoever came first
        assert {count for path, count in gets.items() if path != "/index.json"} == {1}, gets
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_what_cannot_be_read_is_named(server, tmp_path):
    url, folder, _, _ = server
    for wrong in (url + "/nowhere", "nothing://bucket/shards", "http://127.0.0.1:9/shards"):
        with pytest.raises(UserError, match="--shards: .*/index.json cannot be read"):
            Shards.open(wrong, "train", cache=tmp_path / "cache")
    for secret in ("https://me:hunter2@example.org/shards", "s3://id:hunter2@bucket/shards", "https://example.org/shards?signature=hunter2"):
        with pytest.raises(UserError, match="a password or signature in the address") as error:
            Shards.open(secret, "train", cache=tmp_path / "cache")
        assert "hunter2" not in str(error.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--shard_cache"):
        Shards.open(url, "train", cache=tmp_path / "file")
    index = json.loads((folder / "index.json").read_text())
    index["tokenizer_files"] = {"../../x": {"bytes": 1, "sha256": ""}}
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="damaged"):
        Shards.open(url, "train", cache=tmp_path / "cache")

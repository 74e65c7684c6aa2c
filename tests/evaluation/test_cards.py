"""The ECGs of the report, from shards with a manifest at hand and without."""

import json

import numpy as np
import pytest
import wfdb

from sharding.manifest import FORMAT_VERSION, SCHEMA, write_manifest
from toolkit.ecg.gains import gains, rounded
from toolkit.ecg.leads import LEADS
from toolkit.evaluation.cards import ecg_of, ecgs, recordings_of, shown
from toolkit.evaluation.html_report import packed_ecg
from toolkit.shards.reader import Shards
from toolkit.shards.writer import write_index, write_split
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(shards of one ECG, a pair, and a z-scored one; tokenizer; the recordings): records 0 to 3."""
    folder, rng = tmp_path_factory.mktemp("cards"), np.random.default_rng(0)
    time = np.arange(5000) / 500
    recordings = [(0.2 + 0.1 * i) * np.sin(2 * np.pi * (1 + np.arange(12)[:, None] / 4) * time) + 0.02 * rng.normal(size=(12, 5000)) for i in range(3)]
    recordings.append((recordings[0] - recordings[0].mean(1, keepdims=True)) / recordings[0].std(1, keepdims=True))
    tokenizer = ECGTokenizer(TokenizerConfig()).eval()
    blank = {"array": "", "start": 0.0, "report": "", "labels": [], "qc": [], "age": 50.0, "sex": "", "split": "test", "patient": "p", "site": ""}
    rows = []
    for i, ecg in enumerate(recordings):
        wfdb.wrsamp(f"r{i}", fs=500, units=["mV"] * 12, sig_name=list(LEADS), p_signal=ecg.T, fmt=["16"] * 12, write_dir=str(folder))
        rows.append({**blank, "key": f"x_{i}", "source": "ours", "record_id": str(i), "path": str(folder / f"r{i}")})
    rows = [{name: row[name] for name in SCHEMA.names} for row in rows]
    (folder / "manifest").mkdir()
    rows.append({**rows[0], "key": "y_0", "source": "another", "path": str(folder / "r2")})  # the same number in another dataset
    write_manifest(folder / "manifest", rows, [], {})
    samples = []
    for number, which in enumerate([[0], [1, 2], [3]]):
        ids = tokenizer.encode(np.stack([recordings[i] for i in which]).astype(np.float32))
        meta = {"source": "ours", "record_ids": [str(i) for i in which], "gains": [rounded(gains(recordings[i])) for i in which], "tasks": []}
        samples.append((f"s_{number}", ids, meta))
    tokenizer.save_pretrained(folder / "tasks" / "tokenizer")
    index = {"tokenizer": tokenizer.fingerprint(), "codes": 1296, "manifest": "../manifest"}
    write_index(folder / "tasks", {"test": write_split(folder / "tasks", "test", samples, 4)}, kind="tasks", **index)
    assert json.loads((folder / "manifest" / "prepare.json").read_text())["format_version"] == FORMAT_VERSION
    return Shards.open(folder / "tasks", "test"), tokenizer, np.array(recordings, np.float32)


def test_every_ecg_of_a_sample_with_recording_and_reconstruction(made):
    shards, tokenizer, recordings = made
    shown = ecgs(shards, [0, 1], tokenizer)
    assert [len(several) for several in shown.values()] == [1, 2] and list(shown) == [0, 1]
    assert [one["title"] for one in shown[1]] == ["ECG 1", "ECG 2"]
    for one, recording in zip([*shown[0], *shown[1]], recordings):
        assert one["signal"].dtype == one["reconstruction"].dtype == np.float32 and one["signal"].shape == one["reconstruction"].shape == (12, 2500)
        inside = slice(50, -50)  # slow waves: every other sample is what is left, but for noise above 125 Hz and the ends
        assert np.abs(one["signal"][:, inside] - recording[:, ::2][:, inside]).max() < 0.1
        assert (one["unit"], one["note"], one["levels"], one["fs"]) == ("mV", "", [6, 6, 6, 6], 250)
        assert np.array_equal(one["tokens"], tokenizer.encode(recording)) and packed_ecg(one)["arrays"] == ["signal", "reconstruction"]
        wanted = tokenizer.reconstruct(recording)[1]
        assert np.abs(one["reconstruction"][:, inside].mean(1) - wanted.mean(1)).max() < 0.05


def test_an_offset_reaches_both_ends():
    ramp = np.broadcast_to(np.linspace(1, 1.5, 5000, dtype=np.float32), (12, 5000))
    assert np.abs(shown(ramp) - ramp[:, ::2]).max() < 0.002
    assert np.abs(shown(np.ones((12, 5000), np.float32)) - 1).max() < 1e-6


def test_what_was_zscored_upstream_is_no_millivolts(made):
    shards, tokenizer, _ = made
    assert ecg_of(shards, 2, recordings_of(shards), tokenizer)["unit"] == "SD"
    assert ecg_of(shards, 2, {}, tokenizer)["unit"] == "SD"


def test_without_the_recording_the_reconstruction_stands_alone_and_says_so(made):
    shards, tokenizer, recordings = made
    there = recordings_of(shards)
    assert set(there) == {("ours", str(i)) for i in range(4)} | {("another", "0")}
    for gone in ({}, {**there, ("ours", "0"): (there["ours", "0"][0] + "x", 0.0, "")}):  # no manifest; a file that is not there
        one = ecg_of(shards, 0, gone, tokenizer)
        assert one["signal"] is None and "not at hand" in one["note"]
        wanted = tokenizer.decode(shards.ids(0)[0]) * gains(recordings[0])[:, None]
        assert np.abs(one["reconstruction"].mean(1) - wanted.mean(1)).max() < 0.01

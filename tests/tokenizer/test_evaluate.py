"""The whole command on a few synthetic ECGs and a tokenizer that learned nothing; its figures against direct computation."""

import contextlib
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sharding.manifest import read_manifest
from sharding.prepare import main as prepare
from toolkit.ecg.noise import NOISES
from toolkit.ecg.quality import read_checked
from toolkit.ecg.synthetic import main as synthesise
from toolkit.errors import UserError
from toolkit.tokenizer.evaluate import main, spaced
from toolkit.tokenizer.figures import cases
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with a manifest of 60 synthetic ECGs, and an untrained tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    synthesise(["--out", str(folder / "data"), "--records", "60", "--workers", "1"])
    prepare(["ptbxl", "--root", str(folder / "data" / "ptbxl"), "--out", str(folder / "manifest"), "--workers", "1"])
    torch.manual_seed(0)
    ECGTokenizer(TokenizerConfig(levels=[4, 4, 4])).save_pretrained(folder / "tokenizer")
    return folder


def command(corpus, *more) -> list[str]:
    return ["--tokenizer", str(corpus / "tokenizer"), "--manifest", str(corpus / "manifest"), *map(str, more)]


@pytest.fixture(scope="module")
def evaluated(corpus):
    """(folder of results, metrics.json, what was printed) of the train split, which has more ECGs than the valid split of so small a corpus."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        main(command(corpus, "--split", "train", "--max_ecgs", 40, "--noise_ecgs", 1, "--noise_snr", 12, 0, "--max_train_ecgs", 50))
    out = corpus / "tokenizer" / "evaluate-train"
    return out, json.loads((out / "metrics.json").read_text()), shown.getvalue()


def test_figures_are_those_of_a_direct_computation(corpus, evaluated):
    metrics = evaluated[1]
    manifest = read_manifest(corpus / "manifest")
    rows = spaced(manifest[manifest["split"] == "train"].sort_values("key"), 40)
    assert metrics["all"]["ecgs"] == metrics["manifest"]["ecgs"] == len(rows) == 40
    tokenizer = ECGTokenizer.from_pretrained(corpus / "tokenizer")
    mse, ids = [], []  # of each ECG
    for path in rows["path"]:
        ecg = read_checked(path)[0]
        codes, reconstruction = tokenizer.reconstruct(ecg[None])
        mse.append((((ecg - reconstruction[0]) ** 2).mean(1) / ecg.var(1)).mean())
        ids.append(codes[0].tolist())
    groups = [(metrics["all"], set().union(*rows["labels"])), (metrics["by_superclass"]["MI"], {"AMI", "IMI"})]
    for found, of in groups + [(found, {label}) for label, found in metrics["by_label"].items()]:
        members = [i for i, labels in enumerate(rows["labels"]) if of & set(labels)]
        assert found["ecgs"] == len(members) and found["mse"] == pytest.approx(np.mean(np.array(mse)[members]), rel=1e-3)
        seen = sum((ids[i] for i in members), [])
        p = np.array([seen.count(code) for code in set(seen)]) / len(seen)
        assert found["codes"]["codes"] == 64 and found["codes"]["used"] == len(set(seen))
        assert found["codes"]["perplexity"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    counts = [metrics["by_label"][label]["ecgs"] for label in metrics["by_label"]]
    assert counts == sorted(counts, reverse=True) and len(counts) <= 15


def test_noise_has_the_stated_ratio_and_the_clean_ecg_beside_it(evaluated):
    clean, *noisy = evaluated[1]["noise"]
    assert clean["noise"] == "none" and clean["tokens_changed"] == 0 and clean["input"]["mse"] == 0 and clean["output"]["ecgs"] == 1
    assert [(row["noise"], row["snr_db"]) for row in noisy] == [(kind, snr) for kind in NOISES for snr in (12, 0)]
    for row in noisy:
        assert row["input"]["mse"] == pytest.approx(10 ** (-row["snr_db"] / 10), rel=0.01)
        assert 0 < row["tokens_changed"] <= 1


def test_diagnostic_information_of_a_tokenizer_that_learned_nothing_is_lost(evaluated):
    found = evaluated[1]["diagnosis"]
    # fitted and judged on the same ECGs here: the originals are known by heart
    assert found["originals"]["macro_auroc"] > 0.95
    assert found["drop"]["macro_auroc"] == pytest.approx(found["originals"]["macro_auroc"] - found["reconstructions"]["macro_auroc"])


def test_pictures_and_tensorboard_hold_what_metrics_json_holds(evaluated):
    out, metrics, _ = evaluated
    drawn = {path.stem for path in (out / "figures").iterdir()}
    assert drawn == {"overview"} | {f"{name}-{kind}" for name in metrics["by_superclass"] for kind in ("median", "worst")}
    assert np.asarray(Image.open(out / "figures" / "MI-worst.png").convert("RGB")).shape == (172 * 4, 280 * 4, 3)
    board = EventAccumulator(str(out / "tensorboard"), {"images": 0}).Reload()
    assert board.Scalars("mse/all")[0].value == pytest.approx(metrics["all"]["mse"])
    assert [event.step for event in board.Scalars("noise_mse/muscle_output")] == [12, 0]
    assert set(board.Tags()["images"]) == drawn


def test_the_table_is_for_people(evaluated):
    shown = evaluated[2]
    assert re.search(r"^all +40 +\d", shown, re.M) and re.search(r"^MI +\d", shown, re.M) and re.search(r"^muscle +12 +", shown, re.M)
    assert "AUROC" in shown and "Research software" in shown


def test_without_labels_it_says_what_is_left_out_and_again_gives_the_same(corpus, tmp_path, capsys, monkeypatch):
    unlabelled = read_manifest(corpus / "manifest")
    unlabelled["labels"] = [[] for _ in range(len(unlabelled))]
    monkeypatch.setattr("toolkit.tokenizer.evaluate.read_manifest", lambda folder: unlabelled)
    for out in ("once", "again"):
        main(command(corpus, "--max_ecgs", 2, "--noise_ecgs", 1, "--noise_snr", 0, "--out", tmp_path / out))
    assert (tmp_path / "once" / "metrics.json").read_text() == (tmp_path / "again" / "metrics.json").read_text()
    metrics = json.loads((tmp_path / "once" / "metrics.json").read_text())
    assert metrics["by_superclass"] == metrics["by_label"] == {} and "SNOMED" in metrics["diagnosis"]["skipped"]
    assert {path.name for path in (tmp_path / "once" / "figures").iterdir()} == {"overview.png", "all-median.png", "all-worst.png"}
    shown = capsys.readouterr().out
    assert "no labels in the manifest" in shown and "diagnostic information: not measured" in shown


@pytest.mark.parametrize(
    "more, mend",
    [
        (["--max_ecgs", 0], "--max_ecgs 0: has to be 1 or more"),
        (["--noise_ecgs", -1], "--noise_ecgs -1"),
        (["--noise_snr", "nan"], "--noise_snr: has to be finite"),
        (["--tokenizer", "nowhere"], "--tokenizer: nowhere has no config.json"),
        (["--manifest", "nowhere"], "--manifest nowhere has no"),
        (["--out", "/proc/nowhere"], "--out /proc/nowhere cannot be written"),
    ],
)
def test_wrong_arguments_are_named(corpus, more, mend):
    with pytest.raises(UserError, match=re.escape(mend)):
        main(command(corpus, *more))


def test_an_empty_split_is_named(corpus, monkeypatch):
    manifest = read_manifest(corpus / "manifest")
    monkeypatch.setattr("toolkit.tokenizer.evaluate.read_manifest", lambda folder: manifest[manifest["split"] != "test"])
    with pytest.raises(UserError, match="--split test: .* has no ECG in it; choose another of train, valid, test"):
        main(command(corpus, "--split", "test"))


def test_a_recording_that_has_gone_is_named(corpus, tmp_path, monkeypatch):
    manifest = read_manifest(corpus / "manifest")
    manifest["path"] = str(tmp_path / "gone")
    monkeypatch.setattr("toolkit.tokenizer.evaluate.read_manifest", lambda folder: manifest)
    with pytest.raises(UserError, match="--manifest: ECG ptbxl_000.*run `python -m sharding.prepare` again"):
        main(command(corpus, "--out", tmp_path))


def test_spaced_rows_cover_the_split():
    rows = pd.DataFrame({"key": range(100)})
    assert spaced(rows, 4)["key"].tolist() == [0, 25, 50, 75]
    assert len(spaced(rows, 99)) == 99 and spaced(rows, 99)["key"].is_unique
    assert spaced(rows, None) is rows and spaced(rows, 100) is rows


def test_cases_are_the_worst_and_the_one_in_the_middle():
    mse = np.array([0.3, 0.1, np.nan, 0.2, 0.9])
    groups = {"all": np.ones(5, bool), "two": np.array([1, 1, 0, 0, 0], bool), "nan": np.array([0, 0, 1, 0, 0], bool)}
    assert cases(mse, groups) == [("all", "median", 3), ("all", "worst", 4), ("two", "median", 1), ("two", "worst", 0)]

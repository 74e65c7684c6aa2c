"""The numbers of the modality gap against closed forms and a slow loop, and the program on tiny models against `transformers` alone."""

import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from toolkit.evaluation.modality_gap import CONVENTIONS, SPACES, balanced, centroid_distance, gap, main, mixing, one_task
from toolkit.lm.backbone import load_backbone, save_stamp
from toolkit.lm.lora import add_lora, save_adapter
from toolkit.lm.vocabulary import extend
from toolkit.shards.writer import write_index, write_split

# The numbers


def cloud(n, width, seed, centre=0.0, spread=1.0):
    return centre + spread * np.random.default_rng(seed).normal(size=(n, width))


def slow_mixing(ecg, text, k):
    """Every angle by itself, every list of neighbours sorted."""
    all_of_them = [(vector, "ecg") for vector in ecg] + [(vector, "text") for vector in text]
    others = 0
    for i, (one, kind) in enumerate(all_of_them):
        angles = [
            (np.arccos(np.clip(one @ two / np.sqrt(one @ one) / np.sqrt(two @ two), -1, 1)), other_kind)
            for j, (two, other_kind) in enumerate(all_of_them)
            if j != i
        ]
        others += sum(other_kind != kind for _, other_kind in sorted(angles, key=lambda pair: pair[0])[:k])
    share = others / (k * len(all_of_them))
    return share / (len(text) / (len(all_of_them) - 1))


def test_two_far_clusters_are_not_mixed():
    east, north = np.eye(8)[0] * 100, np.eye(8)[1] * 100
    ecg, text = cloud(40, 8, 0, east), cloud(40, 8, 1, north)
    assert mixing(ecg, text) == 0
    distance, cosine = centroid_distance(ecg, text)
    assert distance == pytest.approx(2**0.5, abs=0.01) and cosine == pytest.approx(0, abs=0.01)


def test_one_cloud_is_mixed_as_chance_has_it():
    found = [mixing(cloud(300, 16, seed), cloud(300, 16, seed + 100)) for seed in range(5)]
    assert np.mean(found) == pytest.approx(1, abs=0.02)
    distance, _ = centroid_distance(cloud(3000, 16, 0), cloud(3000, 16, 1))
    assert distance == pytest.approx((2 / 3000) ** 0.5, rel=0.5)  # of centroids whose coordinates have variance 1 / 3000 each, over a norm of about sqrt(16)


def test_neighbours_in_turn_on_a_circle():
    """ECG and text by turns: of the five neighbours on each side the first, third and fifth are of the other kind, 6 of 10."""
    angles = 2 * np.pi * np.arange(200) / 200
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert mixing(circle[::2], circle[1::2]) == pytest.approx(0.6 * 199 / 100)
    distance, _ = centroid_distance(circle[::2], circle[1::2])
    assert distance == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("ecg", "text", "distance", "cosine"),
    [
        ([[3, 0]] * 4, [[0, 3]] * 4, 2**0.5, 0),
        ([[1, 0]] * 4, [[3, 0]] * 4, 1, 1),  # |1 - 3| over a mean norm of 2
        ([[1, 1]] * 4, [[-1, -1]] * 4, 2, -1),
        ([[2, 5]] * 4, [[2, 5]] * 4, 0, 1),
        ([[1, 0], [-1, 0]], [[0, 3], [0, 3]], 1.5, None),  # a centroid at 0 has no direction; (1 + 1 + 3 + 3) / 4 = 2
        ([[0, 0]] * 2, [[0, 0]] * 2, None, None),
    ],
)
def test_centroids_by_hand(ecg, text, distance, cosine):
    for found, expected in zip(centroid_distance(np.array(ecg, float), np.array(text, float)), (distance, cosine)):
        assert np.isnan(found) if expected is None else found == pytest.approx(expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 12), st.integers(1, 3), st.integers(2, 6), st.floats(0, 3), st.integers(0, 2**31))
def test_numbers_are_bounded_and_do_not_depend_on_order_scale_or_direction(n, k, width, apart, seed):
    rng = np.random.default_rng(seed)
    ecg, text = cloud(n, width, seed), cloud(n, width, seed + 1, apart)
    mixed, (distance, cosine) = mixing(ecg, text, k), centroid_distance(ecg, text)
    assert mixed == pytest.approx(slow_mixing(ecg, text, k))
    assert 0 <= mixed <= (2 * n - 1) / n and 0 <= distance <= 2 + 1e-12 and -1 - 1e-12 <= cosine <= 1 + 1e-12
    turned, _ = np.linalg.qr(rng.normal(size=(width, width)))
    for one, two in ((rng.permutation(ecg), rng.permutation(text)), (text, ecg), (7 * ecg, 7 * text), (ecg @ turned, text @ turned)):
        assert mixing(one, two, k) == pytest.approx(mixed)
        assert centroid_distance(one, two) == pytest.approx((distance, cosine))


@pytest.mark.parametrize("sizes", [(12, 13), (10, 10), (0, 0)])
def test_mixing_needs_as_many_of_both_and_more_than_neighbours(sizes):
    with pytest.raises(ValueError, match="more than 10"):
        mixing(*(cloud(n, 4, n) for n in sizes))


def test_the_larger_set_is_drawn_from_without_repeats_and_the_same_each_time():
    large, small = cloud(50, 3, 0), cloud(20, 3, 1)
    ecg, text = balanced(large, small)
    assert len(ecg) == len(text) == 20 and (text == small).all()
    places = [int(np.flatnonzero((large == row).all(1))[0]) for row in ecg]
    assert len(set(places)) == 20 and places == sorted(places) and places != list(range(20))
    assert (balanced(large, small)[0] == ecg).all() and (balanced(small, large)[1] == ecg).all()


def test_what_is_undefined_is_none_in_the_file():
    found = gap(np.repeat([[1.0, 0.0], [-1.0, 0.0]], 6, 0), np.repeat([[0.0, 1.0]], 12, 0))
    assert found["centroid_cosine"] is None and json.loads(json.dumps(found)) == found


def test_a_question_goes_before_a_report_and_the_choice_is_the_same_each_time():
    report, *questions = [{"task": "report", "id": "r"}, *({"task": "ecgqa", "id": str(i)} for i in range(5))]
    chosen = [one_task([report, *questions], place)["id"] for place in range(40)]
    assert set(chosen) == set("01234") and chosen == [one_task([report, *questions], place)["id"] for place in range(40)]
    assert one_task([report], 3) == report


# The program

WORDS = "does this ecg show atrial fibrillation or left bundle branch block yes no sinus rhythm normal with premature beats which rate".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with task shards of 15 samples, a model that was never trained, and an adapter of it."""
    out = tmp_path_factory.mktemp("gap")
    (out / "tasks").mkdir()
    rng = np.random.default_rng(0)
    samples = []
    for i in range(15):
        asked = " ".join(rng.choice(WORDS, 6))
        tasks = [{"id": "q", "task": "ecgqa", "question_type": "single-verify", "question": f"{asked}?", "answer": ["yes"]}] if i % 3 else []
        tasks.append({"id": "r", "task": "report", "question_type": "report", "report": " ".join(rng.choice(WORDS, 4))})
        n = 1 + (i == 4)
        meta = {"source": "made", "split": "test", "record_ids": [str(i)] * n, "patients": ["p"] * n, "gains": [[0.1] * 12] * n, "tasks": tasks}
        samples.append((f"s{i:02d}", rng.integers(0, 16, (n, 20)).astype(np.uint16), meta))
    splits = {"test": write_split(out / "tasks", "test", samples, 100), "valid": write_split(out / "tasks", "valid", samples[:5], 100)}
    index = {"tokenizer": "a" * 16, "codes": 16, "levels": [4, 4]}
    write_index(out / "tasks", splits, kind="tasks", **index)
    _, tokenizer = load_backbone("tiny", lambda: WORDS * 20, 0)
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512, tie_word_embeddings=True)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    vocabulary = extend(model, tokenizer, [4, 4], seed=0, knows_text=False)
    model.save_pretrained(out / "before")
    lm = add_lora(AutoModelForCausalLM.from_pretrained(out / "before"), 4, 8, 0.0, trained_rows=vocabulary.code_rows)
    with torch.no_grad():
        for p in lm.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    (out / "after").mkdir()
    save_adapter(lm, out / "after", {name: p.detach() for name, p in lm.named_parameters() if p.requires_grad})
    for name in ("before", "after"):
        tokenizer.save_pretrained(out / name)
        save_stamp(out / name, index, True)
    return out


def arguments(runs, out, **changes):
    words = {"before": runs / "before", "after": runs / "after", "shards": runs / "tasks", "out": out, "samples": 200} | changes
    return [str(word) for name, value in words.items() for word in (f"--{name}", value)]


def test_the_program_on_tiny_models(runs, tmp_path, capsys):
    pytest.importorskip("umap")
    main(arguments(runs, tmp_path / "one"))
    said = json.loads((tmp_path / "one" / "gap.json").read_text())
    shown = capsys.readouterr().out
    assert said["run"]["samples"] == 15 and said["conventions"] == CONVENTIONS and "not for diagnosis" in shown
    for name in ("before", "after"):
        assert list(said[name]) == list(SPACES)
        for numbers in said[name].values():
            assert f"distance {numbers['centroid_distance']:.3f}" in shown and f"mixing {numbers['mixing']:.3f}" in shown
            assert 0 <= numbers["mixing"] <= 2 and numbers["centroid_distance"] > 0
    assert said["before"]["last hidden state"]["n"] == 15 and said["before"]["input"]["n"] == 16  # all codes occur, and more text tokens
    assert said["before"] != said["after"]
    main(arguments(runs, tmp_path / "two"))
    for name in ("gap.json", "gap.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert not any(path.name.startswith(".") for path in (tmp_path / "one").iterdir())


def test_vectors_are_what_transformers_alone_gives(runs):
    """Every text written out by hand as the model reads it."""
    from toolkit.evaluation.modality_gap import hidden_means, input_rows, load
    from toolkit.shards.reader import Shards

    shards = Shards.open(runs / "tasks", "test")
    samples = [(shards.ids(i), shards.meta(i), i) for i in range(len(shards))]
    model = load(runs / "before", "--before", shards.index, "cpu")
    ecg, text = hidden_means(model, samples, model.prompts)
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(runs / "before"), AutoTokenizer.from_pretrained(runs / "before")
    seen, written = set(), set()
    for i, (codes, meta, _) in enumerate(samples):
        ecgs = "".join("<|ecg_start|>" + "".join(f"<|ecg_{code:04d}|>" for code in one) + "<|ecg_end|>" for one in codes)
        asked, *_ = meta["tasks"]
        said = f"\nQuestion: {asked['question']}\nAnswer:" if asked["task"] == "ecgqa" else "\nWrite the report of this ECG.\nReport:"
        prefix = tokenizer.encode(tokenizer.bos_token + ecgs, add_special_tokens=False)
        text_ids = tokenizer.encode(said, add_special_tokens=False)
        if asked["task"] == "report":
            text_ids += tokenizer.encode(" " + asked["report"], add_special_tokens=False)
        ids = torch.tensor([prefix + text_ids])
        with torch.no_grad():
            hidden = lm(ids, output_hidden_states=True).hidden_states[-1][0].double().numpy()
        names = np.array(tokenizer.convert_ids_to_tokens(ids[0].tolist()))
        is_code = np.array([name.startswith("<|ecg_0") for name in names])
        assert is_code.sum() == codes.size
        np.testing.assert_allclose(ecg[i], hidden[is_code].mean(0), atol=1e-5)
        np.testing.assert_allclose(text[i], hidden[len(prefix) :].mean(0), atol=1e-5)
        seen |= set(codes.reshape(-1).tolist())
        for task in meta["tasks"]:
            whole = (
                (f"\nQuestion: {task['question']}\nAnswer:", " yes")
                if task["task"] == "ecgqa"
                else ("\nWrite the report of this ECG.\nReport:", " " + task["report"])
            )
            written |= {id for part in whole for id in tokenizer.encode(part, add_special_tokens=False)}
    table = lm.get_input_embeddings().weight.detach().double().numpy()
    ecg, text = input_rows(model, samples, model.prompts)
    first = tokenizer.convert_tokens_to_ids("<|ecg_0000|>")
    np.testing.assert_array_equal(ecg, table[[first + code for code in sorted(seen)]])
    np.testing.assert_array_equal(text, table[sorted(written)])


def failure(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    assert caught.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_mistakes_name_the_argument(runs, tmp_path, capsys, monkeypatch):
    pytest.importorskip("umap")
    out = tmp_path / "out"
    assert "--samples 10: has to be above 10" in failure(capsys, *arguments(runs, out, samples=10))
    assert "--split valid: its 5 samples are too few" in failure(capsys, *arguments(runs, out, split="valid"))
    assert "--before: " in (line := failure(capsys, *arguments(runs, out, before=tmp_path))) and "neither an adapter nor a model" in line
    assert "--after: " in (line := failure(capsys, *arguments(runs, out, after=runs / "tasks"))) and "--model" not in line
    (tmp_path / "file").write_text("")
    assert "--out" in failure(capsys, *arguments(runs, tmp_path / "file"))
    stamp = (runs / "after" / "heartspeed.json").read_text()
    try:
        (runs / "after" / "heartspeed.json").write_text(json.dumps({**json.loads(stamp), "prompts": {"style": "chat"}}))
        assert "cannot be asked as --after was tuned to" in (line := failure(capsys, *arguments(runs, out))) and line.startswith("error: --before: ")
    finally:
        (runs / "after" / "heartspeed.json").write_text(stamp)
    assert not (out / "gap.json").exists()
    monkeypatch.setitem(sys.modules, "umap", None)  # as where it is not installed
    assert "pip install umap-learn" in failure(capsys, *arguments(runs, out))

"""Continuous ECGs: a layer that maps one-hot features to the embedding's rows must give the model that reads tokens; each row alone; two ranks; files."""

import json
import os
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sharding.manifest import write_manifest
from toolkit.ecg.leads import LEADS
from toolkit.errors import UserError
from toolkit.evaluation.generate import answer_tasks
from toolkit.lm import merge
from toolkit.lm.attention import plain_attention
from toolkit.lm.backbone import load_backbone, save_stamp
from toolkit.lm.continuous import FILE, ECGAdapter, embedded, fitted
from toolkit.lm.lora import add_lora, save_adapter
from toolkit.lm.model import PackedLM
from toolkit.lm.trained import load_trained
from toolkit.lm.vocabulary import extend
from toolkit.shards.packing import Group, Sequence, pack
from toolkit.shards.reader import Shards
from toolkit.shards.writer import write_index, write_split
from toolkit.tasks.instruct import TaskData
from toolkit.tasks.prompts import Prompts, task_groups
from toolkit.tokenizer.features import ECGFeatures
from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig

CODES, WIDTH = 1296, 5
ASKED = [{"task": "ecgqa", "question": q, "answer": ["yes"]} for q in ("Does this ECG show atrial fibrillation?", "Which?")]
TASKS = [*ASKED, {"task": "report", "report": "sinus rhythm."}]
STYLES = {"ecg_first": Prompts(), "paper": Prompts("paper")}


def samples(width: int | None = None):
    """(codes, json, tasks) of two single ECGs and a pair; features are random of `width`, or one-hot, times the root that the adapter divides by."""
    rng, made = np.random.default_rng(0), []
    for ecgs, tasks in ((1, TASKS), (1, TASKS[:1]), (2, TASKS[:2])):
        codes = rng.integers(0, CODES, (ecgs, 313)).astype(np.uint16)
        features = np.eye(CODES, dtype=np.float16)[codes.reshape(-1)] * 36 if width is None else rng.standard_normal((codes.size, width)).astype(np.float16)
        made.append((codes, {"gains": [[0.1] * 12] * ecgs, "features": features}, tasks))
    return made


def without_features(sample):
    codes, meta, tasks = sample
    return codes, {name: value for name, value in meta.items() if name != "features"}, tasks


def one_hot(model, vocabulary) -> ECGAdapter:
    rows = vocabulary.code_rows
    adapter = ECGAdapter(np.zeros(CODES), np.ones(CODES), model.config.hidden_size, rows)
    with torch.no_grad():
        adapter.weight.copy_(model.get_input_embeddings().weight[rows.start : rows.stop].T)
        adapter.bias.zero_()
    return adapter


def drawn(vocabulary, hidden=256) -> ECGAdapter:
    torch.manual_seed(3)
    return ECGAdapter(np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32), hidden, vocabulary.code_rows)


def packed(tokenizer, vocabulary, prompts, some):
    return pack([group for sample in some for group in task_groups(tokenizer, vocabulary, prompts, *sample)])


@pytest.mark.parametrize("gain_tokens", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_one_hot_features_are_the_tokens(tiny_with_gains, style, gain_tokens):
    model, tokenizer, vocabulary = tiny_with_gains
    vocabulary = vocabulary if gain_tokens else replace(vocabulary, gain_first=None)
    row, tokens = (packed(tokenizer, vocabulary, STYLES[style], some) for some in (samples(), map(without_features, samples())))
    assert tokens.features is None and len(row.features) == np.isin(row.input_ids, vocabulary.code_rows).sum()
    assert np.array_equal(row.input_ids, tokens.input_ids) and row.layout == tokens.layout
    with torch.no_grad():
        given, expected = PackedLM(model, adapter=one_hot(model, vocabulary))(row, logits=True), PackedLM(model)(tokens, logits=True)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_a_packed_row_is_each_sequence_alone(tiny_with_gains, style):
    model, tokenizer, vocabulary = tiny_with_gains
    adapter = drawn(vocabulary)
    groups = [group for sample in samples(WIDTH) for group in task_groups(tokenizer, vocabulary, STYLES[style], *sample)]
    alone = []
    with torch.no_grad():
        together = PackedLM(model, adapter=adapter)(pack(groups), logits=True)
        with plain_attention(model):
            for group in groups:
                for branch in group.branches or [Sequence(np.zeros(0, int), np.zeros(0, bool))]:
                    ids, target = (np.concatenate(pair) for pair in zip((group.prefix.ids, group.prefix.target), (branch.ids, branch.target)))
                    inputs = model.get_input_embeddings()(torch.from_numpy(ids.astype(np.int64))).clone()
                    made = torch.from_numpy(group.prefix.features).float() @ adapter.weight.T / WIDTH**0.5 + adapter.bias / WIDTH**0.5
                    k = 0
                    for place, token in enumerate(ids):
                        if token in vocabulary.code_rows:
                            inputs[place], k = made[k], k + 1
                    assert k == len(made)
                    alone.append(model(inputs_embeds=inputs[None], use_cache=False).logits[0, np.flatnonzero(target) - 1])
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_layer_also_from_text_alone(tiny):
    model, tokenizer, vocabulary = tiny
    module = PackedLM(model, adapter=drawn(vocabulary))
    row = packed(tokenizer, vocabulary, Prompts(), samples(WIDTH))
    weights = [module.adapter.weight, module.adapter.bias]
    gradients = torch.autograd.grad(module(row), weights)
    assert all(g.abs().min() > 0 for g in gradients)
    with torch.no_grad():  # against a difference quotient
        sums = []
        for step in (0.003, -0.003):
            module.adapter.bias[7] += step
            sums.append(module(row).double())
            module.adapter.bias[7] -= step
    assert ((sums[0] - sums[1]) / 0.006).item() == pytest.approx(gradients[1][7].item(), rel=0.05)
    text = pack([Group(Sequence(np.arange(9), np.arange(9) > 0), [])])
    assert all(g is not None and not g.any() for g in torch.autograd.grad(module(text), weights))  # under ZeRO-2 ranks must have as many
    with pytest.raises(ValueError, match="0 features for 1252 ECG tokens"):
        module(replace(row, features=None))


@pytest.mark.parametrize("style", STYLES)
def test_answers(tiny_with_gains, style):
    model, tokenizer, vocabulary = tiny_with_gains
    how, single = (tokenizer, vocabulary, STYLES[style]), samples()[:2]

    def said(samples, adapter=None):
        """Texts, and how likely they were, of all answers."""
        given = [one for some in answer_tasks(model, *how, samples, 8, "cpu", adapter) for one in some]
        return [one.prediction for one in given], pytest.approx([one.loglik for one in given], abs=1e-3)

    with plain_attention(model):
        answers = said(single, one_hot(model, vocabulary))
        assert answers[0] == said([without_features(sample) for sample in single])[0]
        adapter, others = drawn(vocabulary), samples(WIDTH)
        texts, logliks = said(others, adapter)  # a pair among single ones: the shorter are padded
        alone = [said([sample], adapter) for sample in others]
        assert texts == [text for some, _ in alone for text in some] and logliks == [value for _, some in alone for value in some.expected]
    assert answers[0] != texts[: len(answers[0])]


def test_the_first_layer_is_the_nearest_to_the_rows(tiny):
    model, _, vocabulary = tiny
    rng = np.random.default_rng(0)
    codes, rows = rng.integers(0, CODES, 4000), model.get_input_embeddings().weight[vocabulary.first : vocabulary.first + CODES].detach().numpy()
    features = (rows[codes][:, :WIDTH] * 30 + 0.1 * rng.standard_normal((4000, WIDTH))).astype(np.float32)
    adapter = fitted(model, vocabulary.code_rows, np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32), features, codes)
    design = np.concatenate([features, np.ones((4000, 1))], 1).astype(np.float64)
    expected = design @ np.linalg.lstsq(design, rows[codes].astype(np.float64), rcond=None)[0]
    given = adapter(torch.from_numpy(features)).detach().numpy()
    assert np.abs(given - expected).max() < 0.05 * rows.std()  # the ridge


# --- recordings


def ecg(seed: int) -> np.ndarray:
    rng, t = np.random.default_rng(seed), np.arange(10000) / 500
    return (np.sin(2 * np.pi * (1 + 0.2 * rng.random((12, 1))) * t + rng.random((12, 1)) * 6) + 0.05 * rng.standard_normal((12, 10000))).astype(np.float32)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Folder with `tasks`, whose 4 samples come from 5 recordings of two windows each in `manifest`; the last is a pair."""
    out = tmp_path_factory.mktemp("recorded")
    (out / "tasks").mkdir()
    torch.manual_seed(0)
    tokenizer = ECGTokenizer(TokenizerConfig()).eval()
    tokenizer.save_pretrained(out / "tasks" / "tokenizer")
    described = json.dumps({"sampling_rate": 500, "unit": "mV", "leads": list(LEADS)})
    rows = []
    for k in range(5):
        np.save(out / f"{k}.npy", ecg(k))
        once = {"source": "csv", "record_id": str(k), "patient": str(k), "split": "train", "path": str(out / f"{k}.npy"), "array": described}
        once |= {"report": "", "labels": [], "qc": [], "age": 50.0, "sex": ""}
        rows += [{**once, "key": f"csv_{k}_{window}", "start": 10.0 * window} for window in (1, 0)]
    (out / "manifest").mkdir()
    write_manifest(out / "manifest", rows, [], {})

    def made():
        for ids in ([0], [1], [2], [3, 4]):
            codes = tokenizer.encode(np.stack([ecg(k)[:, :5000] for k in ids]))
            task = {"id": "a", "question_type": "single-verify", "task": "ecgqa", "question": "Is it?", "answer": ["yes"]}
            yield "_".join(map(str, ids)), codes, {"source": "csv", "record_ids": list(map(str, ids)), "gains": [[0.1] * 12] * len(ids), "tasks": [task]}

    splits = {"train": {**write_split(out / "tasks", "train", made(), 10), "tasks": {"single-verify": 4}}}
    once = {"codes": CODES, "levels": [6] * 4, "tokens_per_ecg": 313, "shard_size": 10}
    write_index(out / "tasks", splits, kind="tasks", made_from="", manifest="../manifest", tokenizer=tokenizer.fingerprint(), **once)
    return out, Shards.open(out / "tasks", "train"), tokenizer


def test_features_of_a_sample(recorded, tiny):
    _, shards, tokenizer = recorded
    features = ECGFeatures(tokenizer)
    measured, codes = features.measure([shards])
    raw = tokenizer.features(np.stack([ecg(k)[:, :5000] for k in range(5)])).reshape(5 * 313, -1)
    assert np.array_equal(codes, np.concatenate([shards.ids(i).reshape(-1) for i in range(4)]))
    np.testing.assert_allclose(measured, (raw - raw.mean(0)) / np.maximum(raw.std(0), 0.01 * raw.std(0).max()), atol=1e-3)
    model, words, vocabulary = tiny
    data = TaskData([shards], words, vocabulary, Prompts(), features=features.of)
    for _ in range(2):  # the second from memory
        given = [data.sample(i)[1]["features"] for i in range(4)]
        assert [len(part) for part in given] == [313, 313, 313, 626] and given[0].dtype == np.float16
        np.testing.assert_allclose(np.concatenate(given), measured, atol=0.01)
    row = data.batch([(0, 3), (0, 1)]).inputs
    assert np.array_equal(row.features, np.concatenate([given[3], given[1]]))
    adapter = fitted(model, vocabulary.code_rows, features.mean, features.std, measured, codes)
    assert torch.isfinite(PackedLM(model, adapter=adapter)(row))
    again = ECGFeatures(tokenizer, features.mean, features.std)  # as evaluate.py has them
    assert np.array_equal(again.of(shards, shards.ids(3), shards.meta(3)), given[3])


def test_what_is_not_at_hand_is_named(recorded, tmp_path):
    out, shards, tokenizer = recorded
    codes, meta = shards.ids(0), shards.meta(0)
    with pytest.raises(UserError, match="--ecg_input continuous: only .* % of the codes of 0"):
        ECGFeatures(tokenizer).of(shards, shards.ids(1), meta)
    with pytest.raises(UserError, match="--ecg_input continuous: csv 99 .* is not in its manifest"):
        ECGFeatures(tokenizer).of(shards, codes, {**meta, "record_ids": ["99"]})
    (out / "0.npy").rename(out / "gone.npy")
    try:
        with pytest.raises(UserError, match="--ecg_input continuous: the recording .*0.npy cannot be read"):
            ECGFeatures(tokenizer).of(shards, codes, meta)
    finally:
        (out / "gone.npy").rename(out / "0.npy")
    moved = Shards(tmp_path / "elsewhere" / "tasks", "train", shards.index, shards.rows, None)
    with pytest.raises(UserError, match="--ecg_input continuous: reads the recordings, and the manifest of .* is not at hand"):
        ECGFeatures(tokenizer).of(moved, codes, meta)


# --- files

INDEX = {"tokenizer": "a" * 16, "codes": 16, "levels": [4, 4]}


def test_saved_and_loaded(tmp_path):
    model, tokenizer = load_backbone("tiny", lambda: ["sinus rhythm."] * 5, seed=0)
    vocabulary = extend(model, tokenizer, [4, 4], seed=0, knows_text=False)
    model.save_pretrained(tmp_path / "pretrain")
    adapter, folder = drawn(vocabulary), tmp_path / "instruct"
    adapter.mean, adapter.std = np.arange(WIDTH, dtype=np.float32), np.arange(1, WIDTH + 1, dtype=np.float32)
    lm = add_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "pretrain"), 4, 8, 0.0)
    save_adapter(lm, folder, {name: p.detach() for name, p in lm.named_parameters() if p.requires_grad})
    tokenizer.save_pretrained(folder)
    adapter.save(folder, {name: p.detach() for name, p in adapter.named_parameters()})
    save_stamp(folder, INDEX, True, ecg_input="continuous")
    *_, known, _, loaded = load_trained(folder, INDEX, torch.float32)
    assert loaded.rows == known.code_rows == adapter.rows and np.array_equal(loaded.mean, adapter.mean) and np.array_equal(loaded.std, adapter.std)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), adapter.parameters()))
    with pytest.raises(UserError, match="--adapter: .* was tuned with --ecg_input continuous, which a plain Hugging Face model cannot hold"):
        merge.main(["--adapter", str(folder), "--out", str(tmp_path / "merged")])
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-9])
    with pytest.raises(UserError, match=f"--model: .*{FILE} is missing or damaged"):
        load_trained(folder, INDEX, torch.float32)
    (folder / FILE).unlink()
    with pytest.raises(UserError, match=f"--model: .*{FILE} is missing or damaged"):
        load_trained(folder, INDEX, torch.float32)
    save_stamp(folder, INDEX, True)
    assert load_trained(folder, INDEX, torch.float32)[-1] is None


# --- two ranks

CASES = {"ZeRO-2": (2, False), "ZeRO-3": (3, False), "ZeRO-3, bf16": (3, True)}
STEPS = 3


def small_row(number: int):
    """Of a vocabulary of 96, of which 64 to 79 are codes; every third row is text alone."""
    rng = np.random.default_rng(number)
    ids = rng.integers(0, 64, 40)
    ids[1:13] = rng.integers(64, 80, 12) if number % 3 else ids[1:13]
    features = rng.standard_normal((12, WIDTH)).astype(np.float16) if number % 3 else None
    return pack([Group(Sequence(ids, np.arange(40) > 12, features), [])])


def start_of_training(model):
    """LoRA and layer as all ranks and the single process begin."""
    rng = np.random.default_rng(9)
    features, codes = rng.standard_normal((500, WIDTH)), rng.integers(0, 16, 500)
    adapter = fitted(model, range(64, 80), np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32), features, codes)
    torch.manual_seed(1)
    return PackedLM(add_lora(model, 4, 8, 0.0, trained_rows=range(40, 80)), adapter=adapter)


def zero_rank(rank, port, folder):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"
    )
    torch.set_num_threads(1)
    import deepspeed

    from toolkit.training.distributed import start, sum_over_ranks
    from toolkit.training.zero3 import _load_sharded, whole_state

    ranks = start()
    for name, (stage, bf16) in CASES.items():
        config = {
            "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, "bf16": {"enabled": bf16}, "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}, "steps_per_print": 10**9,
        }  # fmt: skip
        model = _load_sharded(folder / "base", config) if stage == 3 else AutoModelForCausalLM.from_pretrained(folder / "base")
        module = start_of_training(model)
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        losses = []
        for number in range(STEPS):
            one = small_row(2 * number + rank)  # in steps 0 and 1 one of the ranks has no ECG
            loss = engine(one)
            engine.backward(loss / len(one.targets))
            engine.step()
            losses.append(sum_over_ranks([loss.item()], ranks.device)[0] / (2 * len(one.targets)))
        state = whole_state(engine.module.adapter, ranks)
        ids = torch.tensor([[1, 70, 71, 5]])
        engine.eval()
        with torch.no_grad(), plain_attention(engine.module.lm) as plain:  # outside of the engine's forward, as generation is
            table = embedded(plain, engine.module.adapter, ids, np.ones((2, WIDTH), np.float16))
            logits = plain(inputs_embeds=table, use_cache=False).logits.float()
        if ranks.main:
            torch.save((losses, state, logits), folder / f"{name}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.launch
def test_two_ranks_under_zero_train_what_one_process_trains(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, tie_word_embeddings=True, **shape)).save_pretrained(tmp_path / "base")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(zero_rank, (port, tmp_path), nprocs=2)
    module = start_of_training(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    before = {name: p.detach().clone() for name, p in module.adapter.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    expected = []
    for number in range(STEPS):
        rows = [small_row(2 * number), small_row(2 * number + 1)]
        loss = sum(module(row) for row in rows) / sum(len(row.targets) for row in rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    with torch.no_grad(), plain_attention(module.lm) as plain:
        table = embedded(plain, module.adapter, torch.tensor([[1, 70, 71, 5]]), np.ones((2, WIDTH), np.float16))
        logits = plain(inputs_embeds=table, use_cache=False).logits
    for case, (_, bf16) in CASES.items():
        losses, state, given = torch.load(tmp_path / f"{case}.pt", weights_only=True)
        near = 0.03 if bf16 else 1e-4
        assert losses == pytest.approx(expected, abs=near), case
        assert set(state) == {"weight", "bias"}
        for name, weight in module.adapter.named_parameters():
            assert (weight - before[name]).abs().min() > 0, name
            torch.testing.assert_close(state[name].float(), weight, atol=near, rtol=0, msg=f"{case}: {name}")
        torch.testing.assert_close(given, logits, atol=0.1 if bf16 else 1e-3, rtol=0, msg=case)

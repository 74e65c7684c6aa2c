"""The ECG vocabulary on tokenizers with and without BOS, on tied and untied heads; loading with plain transformers."""

import itertools
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from toolkit.errors import UserError
from toolkit.lm.backbone import check_stamp, load_backbone, save_stamp
from toolkit.lm.trained import load_trained
from toolkit.lm.vocabulary import PAD_TO, _ordered_rows, ecg_vocabulary, extend
from toolkit.tasks.prompts import Prompts, ecg_ids, forecast_group


def small(tied: bool, bos: bool):
    words = {w: i for i, w in enumerate(["<unk>", "</s>", "<s>", "sinus", "rhythm", "ecg"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>", **({"bos_token": "<s>"} if bos else {}))
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).eval(), tokenizer


def assert_plain_transformers_load(model, tokenizer, ids, vocabulary, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    x = torch.from_numpy(ids)[None]
    torch.testing.assert_close(again(input_ids=x).logits, model(input_ids=x).logits)
    assert ecg_vocabulary(words) == vocabulary


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_extension_keeps_text_and_adds_1298_real_tokens(tied, bos, tmp_path):
    model, tokenizer = small(tied, bos)
    text = model.get_input_embeddings().weight.detach().clone()
    vocabulary = extend(model, tokenizer, [6, 6, 6, 6], seed=0, knows_text=False)
    assert (vocabulary.start, vocabulary.end, vocabulary.first, vocabulary.codes) == (6, 7, 8, 1296)
    assert model.get_input_embeddings().weight.shape[0] % PAD_TO == 0
    assert (model.get_input_embeddings().weight[:6] == text).all()
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert tokenizer.encode("sinus <|ecg_start|><|ecg_0000|><|ecg_1295|><|ecg_end|>", add_special_tokens=False) == [3, 6, 8, 1303, 7]
    assert tokenizer.decode([3, 8, 4], skip_special_tokens=True).split() == ["sinus", "rhythm"]
    assert extend(model, tokenizer, [6, 6, 6, 6], seed=1, knows_text=False) == vocabulary  # a second time changes nothing

    ids = ecg_ids(tokenizer, vocabulary, np.array([[0, 1295]], np.uint16))
    assert ids.tolist() == [2] * bos + [6, 8, 1303, 7]
    group = forecast_group(tokenizer, vocabulary, np.array([[0, 1295]], np.uint16))
    assert group.prefix.target.tolist() == [False] * bos + [False, True, True]
    assert_plain_transformers_load(model, tokenizer, ids, vocabulary, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_every_row_follows_the_seed_also_those_of_padding(tied):
    """They are in the softmax: with rows from torch's own seed, which is another in every process, no run could be repeated."""
    made = []
    for state in (1, 2):
        model, tokenizer = small(tied, bos=True)
        torch.manual_seed(state)
        extend(model, tokenizer, [6, 6, 6, 6], seed=0, knows_text=True)
        assert torch.initial_seed() == state and len(model.get_input_embeddings().weight) > len(tokenizer)
        made.append([model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()])
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=0)


def test_neighbouring_codes_start_close_to_each_other():
    model, tokenizer = small(True, True)
    vocabulary = extend(model, tokenizer, [6, 6, 6, 6], seed=0, knows_text=False)
    rows = model.get_input_embeddings().weight.detach()[vocabulary.first : vocabulary.first + 1296]
    code = torch.arange(1295)
    step = (rows[:-1] - rows[1:]).norm(dim=1)[code % 6 < 5].mean()  # one step of the first digit
    far = (rows - rows.roll(648, 0)).norm(dim=1).mean()  # three steps of the last
    assert step < 0.8 * far


@pytest.mark.parametrize("levels", [[8, 5, 5, 5, 5], [3, 7, 2]])
def test_rows_follow_the_digits_of_unequal_levels(levels):
    """Without a row's own noise, rows of codes whose digits differ by the same amounts differ by the same vector."""
    rows = _ordered_rows(levels, 0.0, 16, torch.Generator().manual_seed(0))
    places = np.array([sum(d * math.prod(levels[:i]) for i, d in enumerate(digits)) for digits in itertools.product(*map(range, levels))])
    assert sorted(places) == list(range(math.prod(levels)))
    grid = rows[places].reshape(*levels, 16)
    for axis in range(len(levels)):
        steps = grid.diff(dim=axis)
        first = steps.select(axis, 0)[(0,) * (len(levels) - 1)]
        assert first.norm() > 0.1 and (steps - first).abs().max() < 1e-5
    many = _ordered_rows(levels, 0.44, 4096, torch.Generator().manual_seed(0))
    assert many.var().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_gain_tokens_are_real_ordered_and_kept(tied, tmp_path):
    model, tokenizer = small(tied, True)
    vocabulary = extend(model, tokenizer, [6, 6, 6, 6], seed=0, knows_text=False, gain_tokens=True)
    assert (vocabulary.start, vocabulary.first, vocabulary.gain_first) == (6, 8, 1304) and tokenizer.encode("<|gain_31|>")[-1] == 1335
    for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        rows = weight.detach()[1304:1336]
        distance = torch.cdist(rows, rows)
        near, far = distance.diagonal(1), distance.diagonal(8)
        assert near.max() < far.min()
    plain = ecg_vocabulary(tokenizer)
    assert extend(model, tokenizer, [6, 6, 6, 6], seed=1, knows_text=False) == plain == vocabulary  # they stay without being asked for again

    gains = np.array([[1e-3, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.55, 2.57, 50]])
    ids = ecg_ids(tokenizer, vocabulary, np.array([[0, 1295]], np.uint16), gains)
    assert (ids - 1304)[2:14].tolist() == [0, 0, 4, 8, 12, 16, 20, 24, 28, 31, 31, 31]
    assert ids[:2].tolist() == [2, 6] and ids[14:].tolist() == [8, 1303, 7]
    target = forecast_group(tokenizer, vocabulary, np.array([[0, 1295]], np.uint16), gains).prefix.target
    assert ids[:-1][target].tolist() == [8, 1303]  # known inputs are no targets
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == ""
    assert_plain_transformers_load(model, tokenizer, ids, vocabulary, tmp_path)


def test_gain_tokens_are_added_to_a_model_that_knows_ecg_tokens():
    model, tokenizer = small(True, False)
    before = extend(model, tokenizer, [4, 4], seed=0, knows_text=False)
    rows = model.get_input_embeddings().weight.detach()[: before.first + 16].clone()
    vocabulary = extend(model, tokenizer, [4, 4], seed=0, knows_text=False, gain_tokens=True)
    assert vocabulary == replace(before, gain_first=before.first + 16)
    assert torch.equal(model.get_input_embeddings().weight[: before.first + 16], rows)


def test_ten_thousand_codes_and_more_are_in_order_of_their_numbers():
    model, tokenizer = small(True, False)
    assert extend(model, tokenizer, [12, 12, 12, 7], seed=0, knows_text=False).codes == 12_096
    vocabulary = ecg_vocabulary(tokenizer)
    assert vocabulary.first == tokenizer.convert_tokens_to_ids("<|ecg_0000|>") == tokenizer.convert_tokens_to_ids("<|ecg_12095|>") - 12_095


def test_tokens_that_are_not_contiguous_are_no_vocabulary():
    _, tokenizer = small(True, False)
    tokenizer.add_tokens(["<|ecg_start|>", "<|ecg_end|>", "<|ecg_0001|>", "<|ecg_0000|>"], special_tokens=True)
    with pytest.raises(ValueError, match="not contiguous"):
        ecg_vocabulary(tokenizer)


def test_other_numbers_of_codes_are_refused():
    model, tokenizer = small(True, True)
    extend(model, tokenizer, [6, 6, 6, 6], seed=0, knows_text=False)
    with pytest.raises(UserError, match="1296 ECG codes, the shards' tokenizer has 256"):
        extend(model, tokenizer, [4, 4, 4, 4], seed=0, knows_text=False)


@pytest.mark.parametrize("prompts", [Prompts(gain_text=True), Prompts("chat", background=True)])
def test_a_trained_model_remembers_how_it_is_asked(tmp_path, prompts):
    model, tokenizer = small(False, True)
    vocabulary = extend(model, tokenizer, [4, 4], seed=0, knows_text=False, gain_tokens=not prompts.gain_text)
    index = {"tokenizer": "a" * 16, "codes": 16, "levels": [4, 4]}
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    save_stamp(tmp_path, index, knows_text=True, prompts=asdict(prompts))
    assert load_trained(tmp_path, index, torch.float32)[2:] == (vocabulary, prompts, None)


def test_unknown_backbone_names_the_argument():
    with pytest.raises(UserError, match="--backbone: './no/such/model'"):
        load_backbone("./no/such/model", tuple, 0)


def test_tiny_is_the_same_on_every_rank():
    one, two = (load_backbone("tiny", lambda: ["sinus rhythm"] * 3, 5) for _ in range(2))
    assert one[1].get_vocab() == two[1].get_vocab()
    assert all((a == b).all() for a, b in zip(one[0].parameters(), two[0].parameters()))
    assert one[1].decode(one[1].encode("Überleitung ✓ 心電図")) == "Überleitung ✓ 心電図"  # bytes: nothing is unknown


def test_a_stamp_of_another_tokenizer_is_refused(tmp_path):
    index = {"tokenizer": "a" * 16, "codes": 1296, "levels": [6, 6, 6, 6]}
    with pytest.raises(UserError, match="has no heartspeed.json"):
        check_stamp(tmp_path, index, "--backbone")
    save_stamp(tmp_path, index, knows_text=False)
    stamp = check_stamp(tmp_path, index, "--backbone")
    assert not stamp["knows_text"]
    with pytest.raises(UserError, match="name shards that were made with that one"):
        check_stamp(tmp_path, {**index, "tokenizer": "b" * 16}, "--backbone")

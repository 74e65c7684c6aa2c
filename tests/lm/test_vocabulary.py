"""The ECG vocabulary on tokenizers with and without BOS, on tied and untied heads; loading with plain transformers."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from toolkit.errors import UserError
from toolkit.lm.backbone import check_stamp, load_backbone, save_stamp
from toolkit.lm.vocabulary import PAD_TO, ecg_vocabulary, extend
from toolkit.tasks.prompts import forecast_group, prefix_ids


def small(tied: bool, bos: bool):
    words = {w: i for i, w in enumerate(["<unk>", "</s>", "<s>", "sinus", "rhythm", "ecg"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>", **({"bos_token": "<s>"} if bos else {}))
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_extension_keeps_text_and_adds_1298_real_tokens(tied, bos, tmp_path):
    model, tokenizer = small(tied, bos)
    text = model.get_input_embeddings().weight.detach().clone()
    vocabulary = extend(model, tokenizer, 6, 4, seed=0, knows_text=False)
    assert (vocabulary.start, vocabulary.end, vocabulary.first, vocabulary.codes) == (6, 7, 8, 1296)
    assert model.get_input_embeddings().weight.shape[0] % PAD_TO == 0
    assert (model.get_input_embeddings().weight[:6] == text).all()
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert tokenizer.encode("sinus <|ecg_start|><|ecg_0000|><|ecg_1295|><|ecg_end|>", add_special_tokens=False) == [3, 6, 8, 1303, 7]
    assert tokenizer.decode([3, 8, 4], skip_special_tokens=True).split() == ["sinus", "rhythm"]
    assert extend(model, tokenizer, 6, 4, seed=1, knows_text=False) == vocabulary  # a second time changes nothing

    ids = prefix_ids(tokenizer, vocabulary, np.array([[0, 1295]], np.uint16))
    assert ids.tolist() == [2] * bos + [6, 8, 1303, 7]
    group = forecast_group(tokenizer, vocabulary, np.array([[0, 1295]], np.uint16))
    assert group.prefix.target.tolist() == [False] * bos + [False, True, True, False]

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    x = torch.from_numpy(ids)[None]
    torch.testing.assert_close(again(input_ids=x).logits, model(input_ids=x).logits)
    assert ecg_vocabulary(words) == vocabulary


def test_neighbouring_codes_start_close_to_each_other():
    model, tokenizer = small(True, True)
    vocabulary = extend(model, tokenizer, 6, 4, seed=0, knows_text=False)
    rows = model.get_input_embeddings().weight.detach()[vocabulary.first : vocabulary.first + 1296]
    code = torch.arange(1295)
    step = (rows[:-1] - rows[1:]).norm(dim=1)[code % 6 < 5].mean()  # one step of the first digit
    far = (rows - rows.roll(648, 0)).norm(dim=1).mean()  # three steps of the last
    assert step < 0.8 * far


def test_other_numbers_of_codes_are_refused():
    model, tokenizer = small(True, True)
    extend(model, tokenizer, 6, 4, seed=0, knows_text=False)
    with pytest.raises(UserError, match="1296 ECG codes, the shards' tokenizer has 256"):
        extend(model, tokenizer, 4, 4, seed=0, knows_text=False)


def test_unknown_backbone_names_the_argument():
    with pytest.raises(UserError, match="--backbone: './no/such/model'"):
        load_backbone("./no/such/model", tuple, 0)


def test_tiny_is_the_same_on_every_rank():
    one, two = (load_backbone("tiny", lambda: ["sinus rhythm"] * 3, 5) for _ in range(2))
    assert one[1].get_vocab() == two[1].get_vocab()
    assert all((a == b).all() for a, b in zip(one[0].parameters(), two[0].parameters()))
    assert one[1].decode(one[1].encode("Überleitung ✓ 心電図")) == "Überleitung ✓ 心電図"  # bytes: nothing is unknown


def test_a_stamp_of_another_tokenizer_is_refused(tmp_path):
    index = {"tokenizer": "a" * 16, "codes": 1296, "levels": 6, "dims": 4}
    with pytest.raises(UserError, match="has no heartspeed.json"):
        check_stamp(tmp_path, index, "--backbone")
    save_stamp(tmp_path, index, knows_text=False)
    assert not check_stamp(tmp_path, index, "--backbone")["knows_text"]
    with pytest.raises(UserError, match="use the shards it was trained with"):
        check_stamp(tmp_path, {**index, "tokenizer": "b" * 16}, "--backbone")

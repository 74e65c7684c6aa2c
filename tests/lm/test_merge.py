"""A merged adapter against PEFT's own forward, and what the program refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolkit.errors import UserError
from toolkit.lm import merge
from toolkit.lm.backbone import load_backbone, save_stamp
from toolkit.lm.continuous import ECGAdapter
from toolkit.lm.lora import add_lora, save_adapter
from toolkit.lm.trained import load_trained
from toolkit.lm.vocabulary import extend

INDEX = {"tokenizer": "a" * 16, "codes": 16, "levels": [4, 4]}
KINDS = {"tied": {}, "untied": {}, "tied, rows, norms": {"norms": True}, "untied, rows, norms": {"norms": True}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of every kind a folder with `pretrain` and its `instruct`, the adapter as after training."""
    out = tmp_path_factory.mktemp("runs")
    for kind, beside in KINDS.items():
        model, tokenizer = load_backbone("tiny", lambda: ["sinus rhythm. normal ecg."] * 5, seed=0)
        if kind.startswith("untied"):
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().roll(1, 0))
        vocabulary = extend(model, tokenizer, [4, 4], seed=0, knows_text=False)
        for folder, part in ((out / kind / "pretrain", model), (out / kind / "instruct", None)):
            tokenizer.save_pretrained(folder)
            if part:
                part.save_pretrained(folder)
        save_stamp(out / kind / "instruct", INDEX, True, prompts={"style": "paper", "background": True},
                   trained_on=[{"shards": "/home/anna/tasks", "digest": "d"}, {"shards": None}])  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(out / kind / "pretrain")
        rows = range(vocabulary.first, vocabulary.first + 16) if beside else ()
        lm = add_lora(model, 4, 8, 0.0, trained_rows=rows, **beside)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in lm.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn_like(p))  # what training would do: lora_B is zero before it
        save_adapter(lm, out / kind / "instruct", {name: p.detach() for name, p in lm.named_parameters() if p.requires_grad})
    return out


def logits(model) -> torch.Tensor:
    ids = torch.arange(model.config.vocab_size)
    return model.eval()(input_ids=ids.view(-1, 64), use_cache=False).logits.detach()


def merged(folder, out, *more):
    merge.main(["--adapter", str(folder), "--out", str(out), *more])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_peft(runs, tmp_path, capsys, kind):
    run, out = runs / kind, tmp_path / "merged"
    base = AutoModelForCausalLM.from_pretrained(run / "pretrain")
    untuned = logits(base)
    expected = logits(PeftModel.from_pretrained(base, run / "instruct"))
    assert (expected - untuned).abs().max() > 1
    merged(run / "instruct", out)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"merging {run / 'instruct'} into {run / 'pretrain'}" and "Research software; not for diagnosis." in said[-1]
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()) and model.dtype == torch.float32
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == kind.startswith("tied")
    assert (logits(model) - expected).abs().max() < 1e-4
    stamps = [json.loads((folder / "heartspeed.json").read_text()) for folder in (run / "instruct", out)]
    assert stamps[1] == stamps[0] | {"trained_on": [{"shards": "tasks", "digest": "d"}, {"shards": None}]}  # no path of where it was made
    for folder in (out, run / "instruct"):
        loaded, tokenizer, vocabulary, prompts, _ = load_trained(folder, INDEX, torch.float32)
        assert (logits(loaded) - expected).abs().max() < 1e-4
        assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(run / "pretrain").get_vocab()
        assert vocabulary.codes == 16 and (prompts.style, prompts.background, prompts.gain_text) == ("paper", True, False)


def test_bf16_is_rounded_once(runs, tmp_path):
    for precision in merge.PRECISIONS:
        merged(runs / "untied, rows, norms" / "instruct", tmp_path / precision, "--precision", precision)
    fp32, bf16 = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("fp32", "bf16"))
    assert bf16.dtype == torch.bfloat16
    for name, weight in fp32.state_dict().items():
        assert torch.equal(weight.bfloat16(), bf16.state_dict()[name]), name


def test_an_adapter_of_continuous_ecgs_is_refused(runs, tmp_path):
    shutil.copytree(runs / "tied" / "instruct", tmp_path / "instruct")
    layer = ECGAdapter(np.zeros(8, np.float32), np.ones(8, np.float32), 256, range(16))
    layer.save(tmp_path / "instruct", layer.state_dict())
    with pytest.raises(UserError, match="--adapter: .*instruct was tuned with --ecg_input continuous"):
        merged(tmp_path / "instruct", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_moved_run_finds_the_backbone_beside_it(runs, tmp_path):
    shutil.copytree(runs / "tied", tmp_path / "moved")
    config = tmp_path / "moved" / "instruct" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(runs), "/gone"))
    merged(tmp_path / "moved" / "instruct", tmp_path / "merged")
    shutil.rmtree(tmp_path / "moved" / "pretrain")
    with pytest.raises(UserError, match="--adapter: the backbone of .* is gone; put it back to /gone/tied/pretrain, or beside the adapter as .*moved/pretrain"):
        merged(tmp_path / "moved" / "instruct", tmp_path / "again")
    with pytest.raises(UserError, match="--model: the backbone of .* is gone"):
        load_trained(tmp_path / "moved" / "instruct", INDEX, torch.float32)
    assert not (tmp_path / "again").exists()


def test_mistakes_name_the_argument_and_leave_nothing(runs, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="--out: .*there is there already"):
        merged(runs / "tied" / "instruct", tmp_path / "there")
    with pytest.raises(UserError, match="--adapter: .*pretrain has no adapter_config.json"):
        merged(runs / "tied" / "pretrain", tmp_path / "out")
    shutil.copytree(runs / "tied" / "instruct", tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="--adapter: .*damaged does not load"):
        merged(tmp_path / "damaged", tmp_path / "out")
    (tmp_path / "damaged" / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="--adapter: .*adapter_config.json is damaged"):
        merged(tmp_path / "damaged", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged", "there"]

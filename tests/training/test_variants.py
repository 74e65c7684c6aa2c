"""What pretraining writes, from every preset, trained part and objective, read by plain transformers; and that each resumes bit for bit."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training.conftest import ROOT, losses

# after the run: the logits of one ECG from the engine itself, on all ranks, since under ZeRO-3 each forward gathers
KEEP_LOGITS = """
import torch
import toolkit.training.loop as loop
finish = loop._finish
def keep(args, job, engine, log, folder, state):
    results = finish(args, job, engine, log, folder, state)
    engine.eval()
    job.data.windows = False  # one sequence, which a plain forward can repeat
    row = job.data.batch([(0, 0)]).inputs
    with torch.no_grad():
        logits = engine(row, logits=True).float()
    if log:
        torch.save({"ids": torch.from_numpy(row.input_ids), "at": torch.from_numpy(row.predict_at), "logits": logits}, folder / "logits.pt")
    return results
loop._finish = keep
"""
STOP_AT_3 = """
import toolkit.training.engine as engine
import toolkit.training.loop as loop
import pathlib, sys
take = loop.take_step
calls = [0]
def stop(*given):
    calls[0] += 1
    if calls[0] == 3:
        (pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1]) / "STOP").touch()
    return take(*given)
loop.take_step = stop
"""
VARIANTS = {
    "zero0": {"precision": "bf16"},
    "zero1": {"precision": "bf16"},
    "zero2, untied": {"backbone": "untied", "kernels": "eager", "gradient_checkpointing": "full"},
    "zero3": {"gradient_checkpointing": "every_2"},
    "zero3, untied, bf16": {"backbone": "untied", "precision": "bf16"},
    "zero2_offload": {"precision": "bf16"},
    "zero3_offload": {"precision": "bf16"},
    "zero2, release": {"train": "lora+norms+embeddings", "objective": "windows", "gradient_checkpointing": "full"},
    "zero3, release": {"train": "lora+norms+embeddings", "backbone": "untied", "head": "ecg"},
    "zero1, new rows": {"train": "new_rows", "gain_tokens": "true", "weight_decay": 0.0},
    "zero3, new rows": {"train": "new_rows", "head": "ecg", "weight_decay": 0.0},
}


def command(corpus, out, name, more):
    given = {
        "deepspeed": ROOT / "ds_configs" / f"{name.split(',')[0]}.json", "shards": corpus / "shards", "output_dir": out, "max_steps": 6, "precision": "fp32",
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1 if name == "zero0" else 2, "seq_len": 1300, "logging_steps": 1,
        "learning_rate": 1e-3, **more, "backbone": corpus / more.get("backbone", "backbone"),
    }  # fmt: skip
    return [word for flag, value in given.items() for word in (f"--{flag}", value)]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_model_is_the_engines_and_a_resumed_run_the_same(fork, corpus, tmp_path, name):
    straight, stopped, more = tmp_path / "straight", tmp_path / "stopped", VARIANTS[name]
    run = fork(2, command(corpus, straight, name, more), tmp_path / "log", before=[KEEP_LOGITS])
    assert run.wait() == [0, 0], run.text()[-4000:]
    run = fork(2, command(corpus, stopped, name, more), tmp_path / "log-1", before=[STOP_AT_3])
    assert run.wait() == [85, 85], run.text()[-4000:]
    assert max(losses(stopped)) == 3
    run = fork(2, command(corpus, stopped, name, more), tmp_path / "log-2")
    assert run.wait() == [0, 0], run.text()[-4000:]
    assert losses(stopped) == losses(straight)
    assert (stopped / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    assert losses(straight)[6] < losses(straight)[1]

    said, results = torch.load(straight / "logits.pt", weights_only=True), json.loads((straight / "train_results.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(straight), AutoTokenizer.from_pretrained(straight)
    bf16 = more.get("precision") == "bf16"
    assert model.dtype == (torch.bfloat16 if bf16 else torch.float32)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == (more.get("backbone") != "untied")
    first = tokenizer.convert_tokens_to_ids("<|ecg_0000|>")
    with torch.no_grad():
        logits = model(input_ids=said["ids"][None]).logits[0, said["at"]].float()
    if more.get("head") == "ecg":
        logits = logits[:, first : first + 1296]
    # in bf16 and in fp32 with merged LoRA the last bits differ: W x + B A x there, (W + B A) x here
    assert (logits - said["logits"]).abs().max() < (0.05 if bf16 else 1e-4 if "release" in name else 1e-5)
    assert math.isfinite(results["eval_loss"])
    if more.get("train") == "new_rows":
        before = AutoModelForCausalLM.from_pretrained(corpus / "backbone").state_dict()
        for key, weight in before.items():
            now = model.state_dict()[key]
            assert torch.equal(now[: len(weight)], weight) if now.shape != weight.shape else torch.equal(now, weight), key

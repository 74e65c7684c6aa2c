"""The parts of benchmarks/gpu_suite.py: each measures one thing and returns rows for a table. `rehearsal`: tiny shapes on the CPU."""

import copy
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import HfDeepSpeedConfig

from benchmarks.baselines import collator, padded_samples
from toolkit.ecg.heart import draw, simulate
from toolkit.errors import UserError
from toolkit.lm.attention import Layout, packed_attention, plain_attention
from toolkit.lm.checkpointing import checkpoint_layers
from toolkit.lm.flops import peak_flops, row_flops
from toolkit.lm.kernels import apply
from toolkit.lm.model import PackedLM
from toolkit.lm.shapes import shape_of
from toolkit.shards.order import MicroBatch
from toolkit.shards.packing import Group, Packed, Sequence, pack
from toolkit.tasks.prompts import forecast_group
from toolkit.tokenizer.tokenizer import ARCHITECTURES, ECGTokenizer, TokenizerConfig
from toolkit.training import distributed, ds_config
from toolkit.training.engine import build_engine, take_step
from toolkit.training.speed import peak_memory

ROOT = Path(__file__).resolve().parents[1]
CODES, ECG_TOKENS, SEQ_LEN = 1296, 313, 4096
ACCUMULATION, WARM_UP, TIMED = 4, 2, 5  # micro-batches of one row; optimizer steps


def device_of(rehearsal: bool) -> torch.device:
    return torch.device("cpu" if rehearsal else "cuda")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable, device: torch.device, rounds: int) -> float:
    """Median milliseconds of a call, after two to warm up."""
    times = []
    for _ in range(rounds + 2):
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        times.append(1e3 * (time.perf_counter() - started))
    return median(times[2:])


def shape(name: str, **changes) -> tuple:
    """(config, what prompts ask of a tokenizer, ECG vocabulary) of a published shape with the ECG rows."""
    lm, tokenizer, vocabulary = shape_of(name, CODES, gain_tokens=False)
    for key, value in changes.items():
        setattr(lm.config, key, value)
    return lm.config, tokenizer, vocabulary


def random_row(tokenizer, vocabulary, tokens: int, seed: int):
    """As many ECGs of random codes as fit `tokens`, packed."""
    codes = np.random.default_rng(seed).integers(0, CODES, (tokens, 1, ECG_TOKENS)).astype(np.uint16)
    length = len(forecast_group(tokenizer, vocabulary, codes[0]).prefix.ids)
    return pack([forecast_group(tokenizer, vocabulary, ecg) for ecg in codes[: tokens // length]])


def mixed_row(vocabulary, branches: bool, groups: int):
    """Sequences of other lengths than each other, or with branches, each a target from its second token on."""
    generator = np.random.default_rng(0)

    def sequence(length: int, first: bool) -> Sequence:
        return Sequence(generator.integers(0, vocabulary.first, length), np.arange(length) >= first)

    def group() -> Group:
        return Group(sequence(int(generator.integers(17, 316)), True), [sequence(int(n), False) for n in generator.integers(8, 40, 5 * branches)])

    return pack([group() for _ in range(groups)])


def made(config, device: torch.device, dtype: torch.dtype):
    """A model of random weights, made where it lives."""
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def kernels(rehearsal: bool) -> list[dict]:
    """Loss, gradients and time of the chunked loss and of Liger's kernels against eager layers with full logits."""
    device, rows = device_of(rehearsal), []
    changes = {} if rehearsal else {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 8}
    config, tokenizer, vocabulary = shape("tiny" if rehearsal else "Llama-3.2-3B", **changes)
    row = random_row(tokenizer, vocabulary, 700 if rehearsal else SEQ_LEN, 0)
    targets = torch.from_numpy(row.targets).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        reference = made(config, device, dtype)
        ways = {"full logits": (copy.deepcopy(reference), "eager"), "chunked loss": (copy.deepcopy(reference), "eager"), "liger": (reference, "liger")}
        found = {}
        for name, (lm, how) in ways.items():
            label = {"what": name, "dtype": str(dtype).removeprefix("torch.")}
            try:
                module = PackedLM(lm, apply(lm, how, device))
            except UserError as error:
                rows.append({**label, "not run": str(error)})
                continue

            def step(module=module, full=name == "full logits"):
                module.zero_grad()
                loss = F.cross_entropy(module(row, logits=True).float(), targets, reduction="sum") if full else module(row)
                loss.backward()
                return loss.item()

            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            loss = step()
            found[name] = {n: p.grad.float().clone() for n, p in module.named_parameters()}
            off = [((found[name][n] - g).norm() / g.norm()).item() for n, g in found["full logits"].items() if g.norm() > 0]
            rows.append({**label, "loss per target": loss / len(targets), "worst gradient, relative difference": max(off),
                         "ms": timed(step, device, 1 if rehearsal else 10), "peak GB": peak_gb(device)})  # fmt: skip
    return rows


def attention(rehearsal: bool) -> list[dict]:
    """Logits of packed rows against every sequence alone in float32; outputs, gradients and time of packed attention against SDPA segment by segment."""
    device, rows = device_of(rehearsal), []
    config, words, vocabulary = shape("tiny", num_key_value_heads=2)
    lms = {dtype: made(config, device, torch.float32).to(dtype).eval() for dtype in (torch.float32, torch.bfloat16)}
    equal = random_row(words, vocabulary, 700 if rehearsal else SEQ_LEN, 1)
    kinds = {"equal lengths": equal, "other lengths": mixed_row(vocabulary, False, 3 if rehearsal else 24), "branches": mixed_row(vocabulary, True, 3)}
    for kind, row in kinds.items():
        truth = alone(lms[torch.float32], row, device)
        for dtype, lm in lms.items():
            plain = (alone(lm, row, device) - truth).abs().max().item()
            with torch.no_grad():
                logits = PackedLM(lm)(row, logits=True).float()
            rows.append({"what": kind, "dtype": str(dtype).removeprefix("torch."), "tokens": len(row.input_ids), "largest logit": truth.abs().max().item(),
                         "packed, difference": (logits - truth).abs().max().item(), "each alone, difference": plain,
                         **attention_alone(row, dtype, device, 1 if rehearsal else 20)})  # fmt: skip
    return rows


def attention_alone(row: Packed, dtype: torch.dtype, device: torch.device, rounds: int) -> dict:
    """One layer's attention with the heads of Llama-3.2-3B, forward and backward: relative difference to float32 by segment, and milliseconds."""
    torch.manual_seed(0)
    exact = [torch.randn(1, heads, len(row.input_ids), 128, device=device) for heads in (24, 8, 8)]
    layouts = {"as trained": Layout.of(row.layout, device), "without a kernel for variable lengths": Layout(row.layout, None)}
    ways = {name: lambda q, k, v, layout=layout: packed_attention(None, q, k, v, None, layout=layout)[0] for name, layout in layouts.items()}
    ways["by segment"] = lambda q, k, v: by_segment(q, k, v, row.layout)

    def results(way: Callable, dtype: torch.dtype) -> list[torch.Tensor]:
        """Output and gradients."""
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in exact]
        output = way(*inputs)
        output.float().square().sum().backward()
        return [output.detach(), *(t.grad for t in inputs)]

    truth, found = results(ways["by segment"], torch.float32), {}
    for name, way in ways.items():
        found[f"{name}, off"] = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(results(way, dtype), truth))
        found[f"{name}, ms"] = timed(lambda way=way: results(way, dtype), device, rounds)
    return found


@torch.no_grad()
def alone(lm, row: Packed, device: torch.device) -> torch.Tensor:
    """Logits float32 [targets, V] with every branch after its prefix as a plain sequence of its own, in the order of the packed row."""
    ids, where = torch.from_numpy(row.input_ids).to(device), {}
    for start, end, branches in row.layout:
        at = end
        for n in (0, *branches):
            with plain_attention(lm):
                logits = lm(ids[None, [*range(start, end), *range(at, at + n)]], use_cache=False).logits[0].float()
            where |= {start + i: logits[i] for i in range(end - start)} if n == 0 else {at + i: logits[end - start + i] for i in range(n)}
            at += n
    return torch.stack([where[int(place)] for place in row.predict_at])


def by_segment(q, k, v, layout) -> torch.Tensor:
    """One SDPA per prefix and one per branch, without any kernel for variable lengths."""
    parts = []
    attend = lambda q, k, v, **how: parts.append(F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how))
    for start, end, branches in layout:
        attend(q[:, :, start:end], k[:, :, start:end], v[:, :, start:end], is_causal=True)
        at = end
        for n in branches:
            seen = [torch.cat([t[:, :, start:end], t[:, :, at : at + n]], 2) for t in (k, v)]
            mask = torch.ones(n, end - start + n, dtype=torch.bool, device=q.device).tril(end - start)
            attend(q[:, :, at : at + n], *seen, attn_mask=mask)
            at += n
    return torch.cat(parts, 2).transpose(1, 2)


def tokenizer(rehearsal: bool) -> list[dict]:
    """Ids on the device against those on the CPU, of every architecture."""
    device, rows = device_of(rehearsal), []
    generator = np.random.default_rng(0)
    ecgs = np.stack([simulate(draw(generator), generator) for _ in range(2 if rehearsal else 128)])
    for arch in ARCHITECTURES:
        torch.manual_seed(0)
        made_here = ECGTokenizer(TokenizerConfig(arch)).eval()
        ids = made_here.encode(ecgs)
        there = copy.deepcopy(made_here).to(device)
        different = int((there.encode(ecgs) != ids).sum())
        ms = timed(lambda there=there: there.encode(ecgs), device, 1 if rehearsal else 3)
        rows.append({"what": arch, "ids": ids.size, "ids that differ": different, "ECG/s": 1e3 * len(ecgs) / ms})
    return rows


def peak_gb(device: torch.device) -> float:
    return peak_memory(device) / 1e9


def training(stage: int, checkpointing: str, rehearsal: bool) -> list[dict]:
    """The real step over packed rows with the 3 B shape under ZeRO, world 1."""
    config, words, vocabulary = shape("tiny" if rehearsal else "Llama-3.2-3B")
    ranks = distributed.start()
    args = SimpleNamespace(per_device_train_batch_size=1, gradient_accumulation_steps=ACCUMULATION, max_grad_norm=1.0, learning_rate=1e-5, weight_decay=0.0)
    resolved = ds_config.resolve(str(ROOT / f"ds_configs/zero{stage}.json"), args, ranks.world, True, config.hidden_size)
    alive = HfDeepSpeedConfig(resolved) if stage == 3 else None  # while it lives, models are born sharded
    lm = made(config, ranks.device, torch.bfloat16)
    del alive
    how = apply(lm, "auto", ranks.device)
    checkpoint_layers(lm, checkpointing)
    flops = row_flops(lm)
    engine = build_engine(PackedLM(lm, how), args, resolved)
    rows = [random_row(words, vocabulary, 700 if rehearsal else SEQ_LEN, seed) for seed in range(ACCUMULATION)]
    micro = [MicroBatch(row, len(row.targets), len(row.input_ids), len(row.layout)) for row in rows]
    targets, times = sum(m.targets for m in micro), []
    for _ in range(1 + 1 if rehearsal else WARM_UP + TIMED):
        wait(ranks.device)
        started = time.perf_counter()
        take_step(engine, lambda engine, row: engine(row), micro, targets, ranks, None, [], (0, 0))
        wait(ranks.device)
        times.append(time.perf_counter() - started)
    label = {"what": f"heartspeed, ZeRO-{stage}", "checkpointing": checkpointing, "kernels": how}
    return [{**label, **speed(times[1 if rehearsal else WARM_UP :], rows, sum(map(flops, rows)), ranks.device)}]


def speed(times: list[float], rows: list, flops: float, device: torch.device) -> dict:
    """Of optimizer steps over `rows`: tokens/s, MFU, seconds, peak memory."""
    peak, source = peak_flops(device, True)
    tokens, step = sum(len(row.input_ids) for row in rows), median(times)
    return {"tokens/s": tokens / step, "MFU %": 100 * flops / step / peak, "s a step": step, "tokens a step": tokens, "peak GB": peak_gb(device),
            "peak": source}  # fmt: skip


def hf_trainer(checkpointing: str, rehearsal: bool) -> list[dict]:
    """transformers.Trainer with ds_configs/zero2.json on the same ECGs, a sample each; with Liger where it is installed."""
    config, words, vocabulary = shape("tiny" if rehearsal else "Llama-3.2-3B")
    device, steps = distributed.start().device, 2 if rehearsal else WARM_UP + TIMED
    lm = made(config, device, torch.bfloat16)
    flops = row_flops(lm)
    rows = [random_row(words, vocabulary, 700 if rehearsal else SEQ_LEN, seed) for seed in range(ACCUMULATION)]
    samples = [sample for row in rows for sample in padded_samples(row)] * steps
    zero = json.loads((ROOT / "ds_configs/zero2.json").read_text()) | {"data_types": {"grad_accum_dtype": "fp32"}}
    liger = device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    marks = []

    class Marks(TrainerCallback):
        def on_step_end(self, *_, **__):
            wait(device)
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out, deepspeed=zero, use_cpu=rehearsal, bf16=True, per_device_train_batch_size=len(samples) // steps // ACCUMULATION,
            gradient_accumulation_steps=ACCUMULATION, max_steps=steps, learning_rate=1e-5, save_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True, remove_unused_columns=False, use_liger_kernel=liger, gradient_checkpointing=checkpointing == "full",
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        Trainer(lm, arguments, data_collator=collator(0), train_dataset=samples, callbacks=[Marks()]).train()
    times = [b - a for a, b in zip(marks, marks[1:])][0 if rehearsal else WARM_UP - 1 :]
    label = {"what": "HF Trainer, ZeRO-2", "checkpointing": checkpointing, "kernels": "liger" if liger else "eager"}
    return [{**label, **speed(times, rows, sum(map(flops, rows)), device)}]

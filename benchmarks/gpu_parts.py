"""Parts of benchmarks/gpu_suite.py about kernels: each measures one thing and returns rows for a table. `rehearsal`: tiny shapes on the CPU."""

import copy
import time
import warnings
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from toolkit.ecg.heart import draw, simulate
from toolkit.errors import UserError
from toolkit.lm.attention import Layout, branch_kernel, packed_attention, plain_attention, variable_length_kernel
from toolkit.lm.kernels import apply
from toolkit.lm.model import PackedLM
from toolkit.lm.shapes import shape_of
from toolkit.shards.packing import Group, Packed, Sequence, pack
from toolkit.tasks.prompts import ecg_ids, forecast_group
from toolkit.tokenizer.tokenizer import ARCHITECTURES, ECGTokenizer, TokenizerConfig
from toolkit.training.speed import peak_memory

CODES, ECG_TOKENS, SEQ_LEN = 1296, 313, 4096
ECGS, QUESTIONS = 4, 23  # of a row of instruction tuning; ECG-QA has 23 questions for an ECG of PTB-XL


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


def question_groups(tokenizer, vocabulary, ecgs: int, questions: int, seed: int) -> list[Group]:
    """ECGs of random codes, each with as many questions of 20 to 25 random tokens, of which the last four are the answer."""
    generator = np.random.default_rng(seed)

    def question() -> Sequence:
        length = int(generator.integers(20, 26))
        return Sequence(generator.integers(0, vocabulary.first, length), np.arange(length) >= length - 4)

    def group() -> Group:
        ids = ecg_ids(tokenizer, vocabulary, generator.integers(0, CODES, (1, ECG_TOKENS)).astype(np.uint16))
        return Group(Sequence(ids, np.zeros(len(ids), bool)), [question() for _ in range(questions)])

    return [group() for _ in range(ecgs)]


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
    questions = pack(question_groups(words, vocabulary, *((1, 3) if rehearsal else (ECGS, QUESTIONS)), 2))
    kinds = {"equal lengths": equal, "other lengths": mixed_row(vocabulary, False, 3 if rehearsal else 24), "branches": mixed_row(vocabulary, True, 3),
             "questions": questions}  # fmt: skip
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
    layouts = {"as trained": Layout.of(row.layout, device), "by SDPA": Layout(row.layout)}
    ways = {name: lambda q, k, v, layout=layout: packed_attention(None, q, k, v, None, layout=layout)[0] for name, layout in layouts.items()}
    ways["by segment"] = lambda q, k, v: by_segment(q, k, v, row.layout)

    def results(way: Callable, dtype: torch.dtype) -> list[torch.Tensor]:
        """Output and gradients."""
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in exact]
        output = way(*inputs)
        output.float().square().sum().backward()
        return [output.detach(), *(t.grad for t in inputs)]

    truth, found = results(ways["by segment"], torch.float32), {"through": through(layouts["as trained"], exact[0].to(dtype), exact[1])}
    for name, way in ways.items():
        found[f"{name}, off"] = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(results(way, dtype), truth))
        found[f"{name}, ms"] = timed(lambda way=way: results(way, dtype), device, rounds)
    return found


def through(layout: Layout, query: torch.Tensor, key: torch.Tensor) -> str:
    """What packed attention calls for such inputs, and why if it is not the kernel that it wants."""
    if query.device.type == "cpu" or query.dtype == torch.float32:
        return "SDPA"
    if layout.boundaries is not None:
        return "varlen" if variable_length_kernel() else "SDPA"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kernel = branch_kernel(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3], None)
    return "flex" if kernel else f"SDPA {' '.join(str(warning.message) for warning in said)}"


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

"""Model FLOPs of a packed row, and the FLOPs that a device can do: what MFU is made of."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from toolkit.shards.packing import Packed


def row_flops(lm: PreTrainedModel | PeftModel, head_rows: int | None = None) -> Callable[[Packed], float]:
    """A function: FLOPs of one forward and backward pass over a row, by the matrix products alone, a multiplication and an addition each.

    head_rows: rows of the head that logits are computed of; None: all. What gradient checkpointing computes a second time is not counted (as in MFU,
    PaLM, arXiv 2204.02311, appendix B); nor are norms, activations and the embedding. Forward, per token: twice the weights of each linear layer; per
    predicted token: twice those of the head; per pair of query and key that see each other: 4 x heads x head size in each layer. Backward: as much for
    the gradient of the input, and as much again for that of a weight that is trained. For dense models: experts are not linear layers and not counted.
    Works on models on the meta device and after ZeRO-3 has partitioned the weights.
    """
    base = lm.get_base_model() if isinstance(lm, PeftModel) else lm
    config, head = base.config.get_text_config(), base.get_output_embeddings()
    vocabulary, width = next(_size(module) for module in head.modules() if isinstance(module, nn.Linear))  # PEFT wraps a head whose rows it trains
    head_trained = any(parameter.requires_grad for parameter in head.parameters())
    per_token = 0
    for module in base.get_decoder().modules():
        if isinstance(module, (nn.Linear, Conv1D)):  # PEFT's LoRA layers hold such as well, their frozen weight among them
            rows, columns = _size(module)
            per_token += 2 * rows * columns * (2 + module.weight.requires_grad)
    per_target = 2 * (head_rows or vocabulary) * width * (2 + head_trained)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_pair = 3 * 4 * config.num_hidden_layers * config.num_attention_heads * head_size

    def flops(row: Packed) -> float:
        return float(per_token * len(row.input_ids) + per_target * len(row.predict_at) + per_pair * seen_pairs(row))

    return flops


def seen_pairs(row: Packed) -> int:
    """Pairs (query, key) of a row that attention has to look at: half the square of each prefix; a branch sees the prefix and itself."""
    pairs = 0
    for start, end, branches in row.layout:
        prefix = end - start
        pairs += prefix * (prefix + 1) // 2 + sum(branch * prefix + branch * (branch + 1) // 2 for branch in branches)
    return pairs


def _size(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Shape of a layer's weight, also where ZeRO-3 has left an empty one, or where two numbers of 4 bits share a byte."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(getattr(module.weight, "ds_shape", module.weight.shape))


@dataclass(frozen=True)
class GPU:
    """A card by NVIDIA's data sheet: dense TFLOPS (sparse ones halved) and GB of memory. `device` matches the whole name that CUDA gives."""

    device: str
    memory: int
    bf16: float | None
    tf32: float | None
    fp32: float


GPUS = {
    "h200": GPU(r"NVIDIA H200", 141, 989, 494, 67),
    "h100": GPU(r"NVIDIA H100 80GB HBM3", 80, 989, 494, 67),
    "h100-nvl": GPU(r"NVIDIA H100 NVL", 94, 835, 417, 60),
    "h100-pcie": GPU(r"NVIDIA H100 PCIe", 80, 756, 378, 51),
    "a100-80": GPU(r"NVIDIA A100(-SXM4-80GB| 80GB PCIe)", 80, 312, 156, 19.5),
    "a100-40": GPU(r"(NVIDIA )?A100-(SXM4|PCIE)-40GB", 40, 312, 156, 19.5),
    "l40s": GPU(r"NVIDIA L40S", 48, 362, 183, 91.6),
    "a40": GPU(r"NVIDIA A40", 48, 149.7, 74.8, 37.4),
    "rtx4090": GPU(r"NVIDIA GeForce RTX 4090", 24, 165, 82.6, 82.6),
    "v100": GPU(r"Tesla V100-SXM2-(16|32)GB", 32, None, None, 15.7),
}


def peak_flops(device: torch.device, bf16: bool) -> tuple[float, str]:
    """Peak FLOPS of a device in the precision of a run, and where the figure is from: the data sheet, or a matrix product measured there (0.2 s).

    fp32 on GPUs is TF32 where `torch.get_float32_matmul_precision()` allows it.
    """
    precision = "bf16" if bf16 else "fp32"
    if device.type == "cuda":
        precision = "tf32" if not bf16 and torch.get_float32_matmul_precision() != "highest" else precision
        name = torch.cuda.get_device_name(device)
        for gpu in GPUS.values():
            if re.fullmatch(gpu.device, name) and getattr(gpu, precision):
                return getattr(gpu, precision) * 1e12, f"data sheet of {name}, dense {precision}"
    return _measured(device, torch.bfloat16 if bf16 else torch.float32), f"measured matmul, {precision}"


def _measured(device: torch.device, dtype: torch.dtype, budget: float = 0.2) -> float:
    """Median FLOPS of square matrix products, as many as fit `budget` seconds but at least one."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(2))
    wait = getattr(torch, device.type).synchronize
    started, times = time.perf_counter(), []
    torch.mm(a, b)  # the first loads the library
    while not times or time.perf_counter() - started < budget:
        wait()
        before = time.perf_counter()
        torch.mm(a, b)
        wait()
        times.append(time.perf_counter() - before)
    return 2 * n**3 / sorted(times)[len(times) // 2]

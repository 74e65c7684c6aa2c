"""Finite scalar quantisation (Mentzer et al. 2023, arXiv 2309.15505; HeartLLM section "ECG tokenization"): every output rounded to one of a few levels.

With `levels` = [L_0, L_1, ...] an output z_i in [0, 1] becomes digit_i = round(z_i * (L_i - 1)), and id = sum_i digit_i * L_0 * ... * L_(i-1):
for [6, 6, 6, 6], sum_i digit_i * 6**i.
"""

import math

import torch


def steps(levels: list[int], like: torch.Tensor) -> torch.Tensor:
    """[dims]: the largest digit of each dimension, on the device and in the type of `like`."""
    return torch.tensor(levels, device=like.device, dtype=like.dtype) - 1


def quantise(z: torch.Tensor, levels: list[int]) -> torch.Tensor:
    """z in [0, 1], [..., dims], rounded to its levels, still in [0, 1]; the gradient passes straight through."""
    most = steps(levels, z)
    return z + (torch.round(z * most) / most - z).detach()


def boundary_distance(z: torch.Tensor, levels: list[int]) -> torch.Tensor:
    """How far z * (L - 1) is from the nearest boundary of two digits, in digits, 0 to 0.5; shape of z."""
    return ((z * steps(levels, z)) % 1 - 0.5).abs()


def ids_of(z: torch.Tensor, levels: list[int]) -> torch.Tensor:
    """z in [0, 1], [..., dims] -> int64 [...]."""
    return (torch.round(z * steps(levels, z)).long() * _weights(levels, z.device)).sum(-1)


def codes_of(ids: torch.Tensor, levels: list[int]) -> torch.Tensor:
    """int64 [...] -> float32 [..., dims] in [0, 1]: the inverse of `ids_of`."""
    digits = ids[..., None] // _weights(levels, ids.device) % torch.tensor(levels, device=ids.device)
    return digits.float() / steps(levels, digits.float())


def _weights(levels: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([math.prod(levels[:i]) for i in range(len(levels))], device=device)

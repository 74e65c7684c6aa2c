"""Normalisation before the encoder: each lead to mean 0 and standard deviation 1, over the whole record or over the past alone.

Statistics are float64, so that they do not depend on the order of a sum: the normalised signal is the same on any machine, whatever
stretches it came in.
"""

import torch
from torch.nn import functional as F

from toolkit.ecg.leads import SAMPLING_RATE

STRIDE = 16  # samples a token
LEFT = 8  # samples of silence before a record: 8 + 5,000 = 313 * 16, so that the last token of 10 s waits for no sample beyond them
FLOOR = 1e-3  # mV: a lead that passed the quality check is above it, an artificial flat one stays zero instead of exploding

# `running`: the weight of a sample falls to 1/e in 10 s, and the first samples of a stream are not alone: 0.5 s of a typical lead stand before
# them. Without that the first beat would be divided by the noise before it.
FORGET = 10 * SAMPLING_RATE
PRIOR, PRIOR_VARIANCE = 250, 0.2**2  # samples; mV**2


def zscore(ecg: torch.Tensor, floor: float = FLOOR) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float [B, 12, T] mV -> (float32 [B, 12, T], mean, SD), the last two float64 [B, 12, 1] mV, over all T. Floor 0: a lead without variance is divided by 1."""
    ecg = ecg.double()
    mean = ecg.mean(-1, keepdim=True)
    centred = ecg - mean
    std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / ecg.shape[-1] ** 0.5  # a quarter of the time of Tensor.std
    std = std.clamp_min(floor) if floor else torch.where(std == 0, 1, std)
    return (centred / std).float(), mean, std


def running(ecg: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """float [B, 12, T] mV -> (float32 [B, 12, T], mean, SD, state), mean and SD float64 [B, 12, T], constant within a token and from nothing after it.

    T + LEFT must be a multiple of 16 at the beginning of a stream (state None), T itself after it; `state` is float64 [B, 12, 3]
    (sums of 1, x and x**2, each sample weighted by exp(-age / FORGET)), and a stream may be cut anywhere between tokens.
    """
    ecg, first = ecg.double(), LEFT if state is None else 0
    blocks = F.pad(ecg, (first, 0)).unflatten(-1, (-1, STRIDE))  # [B, 12, K, 16]
    count = torch.full(blocks.shape[:-1], float(STRIDE), dtype=torch.float64, device=ecg.device)
    count[..., 0] -= first
    sums = torch.stack([count, blocks.sum(-1), blocks.square().sum(-1)], -1)  # [B, 12, K, 3]
    age = torch.arange(sums.shape[2], dtype=torch.float64, device=ecg.device)
    decay = torch.exp((age[None] - age[:, None]) * STRIDE / FORGET).tril()  # weight of block j in the sums at block k
    sums = decay @ sums
    if state is not None:
        sums = sums + torch.exp(-(age[:, None] + 1) * STRIDE / FORGET) * state[..., None, :]
    weight, total, squares = sums.unbind(-1)
    mean = total / weight
    variance = (squares - weight * mean**2).clamp_min(0)
    std = ((variance + PRIOR * PRIOR_VARIANCE) / (weight + PRIOR)).sqrt().clamp_min(FLOOR)
    mean, std = (x.repeat_interleave(STRIDE, -1)[..., first:] for x in (mean, std))
    return ((ecg - mean) / std).float(), mean, std, sums[:, :, -1]

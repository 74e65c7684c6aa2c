"""Normalisation before the encoder: each lead to mean 0 and standard deviation 1, over the whole record or over the past alone.

Statistics are float64: what depends on a machine's order of summation is far below the last bit of the float32 signal. The running ones are added
in one order whatever stretches a stream comes in.
"""

import math

import numpy as np
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
    """float [B, 12, T] mV -> (float32 [B, 12, T], mean, SD), the last two float64 [B, 12, 1] mV. Floor 0: a lead without variance is divided by 1."""
    ecg = ecg.double()
    mean = ecg.mean(-1, keepdim=True)
    centred = ecg - mean
    std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / ecg.shape[-1] ** 0.5  # 0.01 ms an ECG, Tensor.std 0.34
    std = std.clamp_min(floor) if floor else torch.where(std == 0, 1, std)
    return (centred / std).float(), mean, std


def running(ecg: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """float [B, 12, T] mV -> (float32 [B, 12, T], mean, SD, state), mean and SD float64 [B, 12, T], constant within a token and from nothing after it.

    A lead whose baseline jumps is read with a large SD until that is forgotten: after a step of 1 mV the SD is twice the ordinary for 12 s, after one of
    300 mV for two minutes. Give it what a monitor's high-pass filter leaves, not the electrodes' offsets.
    T + LEFT must be a multiple of 16 at the beginning of a stream (state None), T itself after it; `state` is float64 [B, 12, 3]
    (sums of 1, x and x**2, each sample weighted by exp(-age / FORGET)), and a stream may be cut anywhere between tokens.
    """
    ecg, first = ecg.double(), LEFT if state is None else 0
    blocks = F.pad(ecg, (first, 0)).unflatten(-1, (-1, STRIDE))  # [B, 12, K, 16]
    count = torch.full(blocks.shape[:-1], float(STRIDE), dtype=torch.float64, device=ecg.device)
    count[..., 0] -= first
    own = torch.stack([count, _sum(blocks), _sum(blocks.square())]).movedim(-1, 0)  # [K, 3, B, 12]
    # One token after the other: a product with a matrix of weights adds in an order that depends on the number of tokens. With an electrode's offset of
    # 300 mV 1.6 % of the samples differed between two cuts of a stream; and it took 10.8 ms for 10 s on one core, this 0.9.
    sums = own.cpu().contiguous().numpy()
    last = np.zeros(sums.shape[1:]) if state is None else state.movedim(-1, 0).cpu().numpy()
    for token in sums:
        token += math.exp(-STRIDE / FORGET) * last
        last = token
    sums = torch.from_numpy(sums).to(ecg.device).movedim(0, -1)  # [3, B, 12, K]
    weight, total, squares = sums
    mean = total / weight
    variance = (squares - weight * mean.square()).clamp_min(0)
    std = ((variance + PRIOR * PRIOR_VARIANCE) / (weight + PRIOR)).sqrt()
    mean, std = (x.repeat_interleave(STRIDE, -1)[..., first:] for x in (mean, std))
    return ((ecg - mean) / std).float(), mean, std, sums[..., -1].movedim(0, -1)


def _sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension, a power of 2, half onto half: the same order of additions for any shape."""
    while x.shape[-1] > 1:
        x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return x[..., 0]

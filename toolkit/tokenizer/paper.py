"""The architecture as the paper describes it (HeartLLM section "ECG tokenization"); what it leaves open (widths, decoder) is chosen to train on a CPU.

One encoder shared by the 12 leads, temporal-inception blocks with down-sampling by 16 in all, leads concatenated, linear to the code.
"""

import torch
from torch import nn
from torch.nn import functional as F

LEAKY_SLOPE = 0.01
CHANNELS = 32  # per lead, as in the authors' release
DECODER_CHANNELS, DECODER_BLOCKS = 128, 3  # 0.9 M parameters


class Inception(nn.Module):
    """LeakyReLU(GroupNorm(sum of parallel Conv1d with kernels 1, 3, 5, 7)) + input; [N, C, T] -> [N, C, T].

    A sum of parallel convolutions is one convolution with the zero-padded kernels added up, so the forward pass is a single
    kernel-7 convolution: 7 instead of 16 multiplications per weight pair and one pass over memory instead of four.
    """

    KERNELS = (1, 3, 5, 7)

    def __init__(self, channels: int, groups: int = 8):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(channels, channels, k, padding=k // 2, bias=False) for k in self.KERNELS)
        self.norm = nn.GroupNorm(groups, channels)

    def merged_kernel(self) -> torch.Tensor:
        widest = max(self.KERNELS)
        return sum(F.pad(conv.weight, [(widest - k) // 2] * 2) for conv, k in zip(self.convs, self.KERNELS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.conv1d(x, self.merged_kernel(), padding=max(self.KERNELS) // 2)
        return F.leaky_relu(self.norm(y), LEAKY_SLOPE) + x


class Encoder(nn.Module):
    """float [B, 12, T] -> [B, ceil(T/16), dims], unbounded. All leads of a batch go through as one batch of B*12 signals."""

    DOWNSAMPLING = (4, 2, 2)  # the first factor is 4: no block runs above 125 Hz, where it costs a quarter of one at 500 Hz

    def __init__(self, leads: int, dims: int):
        super().__init__()
        stages, width = [], 1
        for factor in self.DOWNSAMPLING:
            kernel = 2 * factor - 1  # odd, so that T samples become ceil(T / factor)
            stages += [nn.Conv1d(width, CHANNELS, kernel, stride=factor, padding=kernel // 2, bias=False), Inception(CHANNELS)]
            width = CHANNELS
        self.stages = nn.Sequential(*stages)
        self.to_code = nn.Linear(leads * CHANNELS, dims)

    def forward(self, ecg: torch.Tensor) -> torch.Tensor:
        batch, leads, samples = ecg.shape
        h = self.stages(ecg.reshape(batch * leads, 1, samples))  # [B*12, C, L]
        h = h.reshape(batch, leads * h.shape[1], h.shape[2])
        weight, bias = self.to_code.weight.expand(batch, -1, -1), self.to_code.bias[:, None]
        return torch.baddbmm(bias, weight, h).transpose(1, 2)  # to_code(h.transpose(1, 2)) without its copy


class Decoder(nn.Module):
    """Codes [B, L, dims] in [0, 1] -> [B, 12, 16 * L]. Most layers run at the token rate (31 Hz), where they are 16 times cheaper."""

    def __init__(self, leads: int, dims: int):
        super().__init__()
        self.expand = nn.Linear(dims, DECODER_CHANNELS)
        half = DECODER_CHANNELS // 2
        self.stages = nn.Sequential(
            *[Inception(DECODER_CHANNELS) for _ in range(DECODER_BLOCKS)],
            nn.ConvTranspose1d(DECODER_CHANNELS, half, 8, stride=4, padding=2),
            Inception(half),
            nn.ConvTranspose1d(half, leads, 8, stride=4, padding=2),
        )

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.stages(self.expand(2 * codes - 1).transpose(1, 2))

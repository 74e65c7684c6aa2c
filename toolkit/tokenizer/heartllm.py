"""The architecture of the authors' release (github.com/yangjinning/HeartLLM), module names included, so that its `best.pt` loads.

Encoder: 30,692 parameters, shared by the 12 leads; here the leads of a batch go through it at once, there one after the other.
Decoder: 4,139,916 parameters, most of whose work is done at 500 Hz with 384 channels.
"""

import torch
from torch import nn
from torch.nn import functional as F

DEPTH, CHANNELS, GROUPS = 4, 32, 8


class Inception(nn.Module):
    """Kernels 3, 5, 7 and a pooled 1x1, a quarter of the channels each, concatenated; [N, C_in, T] -> [N, C, T]."""

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        quarter = channels // 4
        self.b1, self.b2, self.b3 = (nn.Conv1d(inputs, quarter, k, padding=k // 2, bias=False) for k in (3, 5, 7))
        self.b4 = nn.Conv1d(inputs, quarter, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.b1(x), self.b2(x), self.b3(x), self.b4(F.max_pool1d(x, 3, 1, 1))], 1)


class ResInception(nn.Module):
    """LeakyReLU(GroupNorm(inception(x) + x)), x through a 1x1 convolution where the channels differ."""

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.inc = Inception(inputs, channels)
        self.match = nn.Identity() if inputs == channels else nn.Conv1d(inputs, channels, 1, bias=False)
        self.norm = nn.GroupNorm(GROUPS, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(self.norm(self.inc(x) + self.match(x)))


class Encoder(nn.Module):
    """float [B, 12, T] -> [B, ceil(T/16), dims], unbounded."""

    def __init__(self, leads: int, dims: int):
        super().__init__()
        widths = [1] + [CHANNELS] * DEPTH
        down = (nn.Conv1d(CHANNELS, CHANNELS, 3, stride=2, padding=1, bias=False) for _ in range(DEPTH))
        self.blocks = nn.ModuleList(nn.Sequential(ResInception(width, CHANNELS), halve) for width, halve in zip(widths, down))
        self.bottleneck = ResInception(CHANNELS, CHANNELS)
        self.to_code = nn.Linear(leads * CHANNELS, dims)

    def forward(self, ecg: torch.Tensor) -> torch.Tensor:
        batch, leads, samples = ecg.shape
        h = self._lead(ecg.reshape(batch * leads, 1, samples))
        return self.to_code(h.reshape(batch, leads * CHANNELS, -1).transpose(1, 2))

    def as_released(self, ecg: torch.Tensor) -> torch.Tensor:
        """The same, lead after lead: with all leads at once the last bits differ for some batch sizes (6e-6 before `to_code` for one ECG)."""
        return self.to_code(torch.cat([self._lead(lead) for lead in ecg.split(1, 1)], 1).transpose(1, 2))

    def _lead(self, h: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            h = block(h)
        return self.bottleneck(h)


class Decoder(nn.Module):
    """Codes [B, L, dims] in [0, 1] -> [B, 12, 16 * L]."""

    def __init__(self, leads: int, dims: int):
        super().__init__()
        width = leads * CHANNELS
        self.expand = nn.Linear(dims, width)
        self.up = nn.ModuleList(nn.ConvTranspose1d(width, width, 3, 2, 1, output_padding=1) for _ in range(DEPTH))
        self.dec = nn.ModuleList(ResInception(width, width) for _ in range(DEPTH))
        self.final = nn.Conv1d(width, leads, 1)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        h = self.expand(codes).transpose(1, 2)
        for up, block in zip(self.up, self.dec):
            h = block(up(h))
        return self.final(h)


def from_release(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of the release's state dict (`enc.`, `dec.`) -> ours (`encoder.`, `decoder.`). Whatever else it holds (buffers of its quantiser) is left out."""
    renamed = {}
    for name, tensor in state.items():
        room, _, rest = name.removeprefix("module.").partition(".")
        if room in ("enc", "dec"):
            renamed[f"{room}oder.{rest}".replace(".b4.1.", ".b4.")] = tensor  # whether its pooling and 1x1 are one Sequential was not to be seen
    return renamed

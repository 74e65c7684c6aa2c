"""Our architecture: all leads at once, and everything at the token rate.

16 samples of 12 leads (with 32 around them) become one vector by a matrix product; what follows are ConvNeXt blocks (Liu et al. 2022, arXiv
2201.03545) over tokens, never a layer at 500 Hz. Encoders of one lead cannot use that leads repeat each other: of 12, four are sums of two others.
The decoder ends with attention over the record, since beats repeat each other too; the encoder has none, so that a token speaks of two thirds of a second.
The last 8 samples before a record are silence, so that 8 + 5,000 samples are 313 tokens and no token of a causal encoder waits for the future.
"""

import torch
from torch import nn
from torch.nn import functional as F

from toolkit.tokenizer.normalise import LEFT, STRIDE

CHANNELS = 192
ENCODER_BLOCKS, DECODER_BLOCKS = 3, 2
HEADS = 4
KERNEL = 7  # tokens, 0.22 s
PATCH = 48  # samples that a token's first layer sees, and that its last one writes


class Block(nn.Module):
    """x + MLP(LayerNorm(depthwise convolution over time)); [B, L, C] -> [B, L, C]. Normalised per token, so nothing of the future is in it if `causal`."""

    def __init__(self, channels: int, causal: bool):
        super().__init__()
        self.padding = (KERNEL - 1, 0) if causal else (KERNEL // 2, KERNEL // 2)
        self.conv = nn.Conv1d(channels, channels, KERNEL, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        nn.init.zeros_(self.down.weight)  # a block begins as the identity
        nn.init.zeros_(self.down.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(F.pad(x.transpose(1, 2), self.padding)).transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.norm(h))))


class Attention(nn.Module):
    """x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x)); all tokens see each other, by rotary positions (Su et al. 2021, arXiv 2104.09864)."""

    BASE = 1000  # the slowest pair turns by 24 degrees in 10 s, the fastest by one radian a token

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels, bias=False), nn.Linear(channels, channels, bias=False)
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        for weight in (self.out.weight, self.down.weight, self.down.bias):
            nn.init.zeros_(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # [B, HEADS, L, C / HEADS] each
        half = q.shape[-1] // 2
        angle = torch.arange(q.shape[-2], device=x.device)[:, None] * self.BASE ** (-torch.arange(half, device=x.device) / half)
        cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)
        q, k = (torch.cat([a * cos - b * sin, b * cos + a * sin], -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Encoder(nn.Module):
    """float [B, 12, T] normalised, T + 8 a multiple of 16 -> [B, (T + 8) / 16, dims], unbounded."""

    def __init__(self, leads: int, dims: int, causal: bool):
        super().__init__()
        around = PATCH - STRIDE
        self.padding = (LEFT + around, 0) if causal else (LEFT + around // 2, around // 2)
        self.patch = nn.Linear(leads * PATCH, CHANNELS)
        self.blocks = nn.Sequential(*[Block(CHANNELS, causal) for _ in range(ENCODER_BLOCKS)])
        self.norm = nn.LayerNorm(CHANNELS)
        self.to_code = nn.Linear(CHANNELS, dims)

    def forward(self, ecg: torch.Tensor) -> torch.Tensor:
        patches = F.pad(ecg, self.padding).unfold(-1, PATCH, STRIDE)  # [B, 12, L, PATCH]
        h = self.patch(patches.transpose(1, 2).flatten(2))
        return self.to_code(self.norm(self.blocks(h)))


class Decoder(nn.Module):
    """Codes [B, L, dims] in [0, 1] -> [B, 12, 16 * L - 8]. Sees the whole record, also where the encoder does not."""

    def __init__(self, leads: int, dims: int):
        super().__init__()
        self.expand = nn.Linear(dims, CHANNELS)
        self.blocks = nn.Sequential(*[Block(CHANNELS, causal=False) for _ in range(DECODER_BLOCKS)], Attention(CHANNELS))
        self.norm = nn.LayerNorm(CHANNELS)
        self.patch = nn.ConvTranspose1d(CHANNELS, leads, PATCH, stride=STRIDE)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.blocks(self.expand(2 * codes - 1)))
        around = (PATCH - STRIDE) // 2
        return self.patch(h.transpose(1, 2))[..., around + LEFT : -around]

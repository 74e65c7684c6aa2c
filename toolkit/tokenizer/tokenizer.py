"""`ECGTokenizer`: 10 s of 12-lead ECG <-> 313 token ids, with `save_pretrained` / `from_pretrained`.

    tokenizer = ECGTokenizer.from_pretrained("runs/demo/tokenizer")
    ids = tokenizer.encode(ecg)            # uint16 [B, 313]
    ecg = tokenizer.decode(ids)            # float32 [B, 12, 5000], per-lead z-scores
"""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from toolkit.ecg.leads import LEADS, SAMPLES, SAMPLING_RATE
from toolkit.errors import UserError, first_line
from toolkit.tokenizer.model import Decoder, Encoder, normalise, quantise

FORMAT_VERSION = 1
# Distance of an encoder output, in levels, to the boundary of two digits below which float64 decides. Float32 is off by 4e-6 at most (60 ECGs, four
# tokenizers), and by other amounts with other instruction sets: 3 of 1.5 M ids differed between AVX2 and AVX-512. At most one ECG in 60 was this close.
TIE = 1e-5
DECODERS = {  # name: (channels, blocks at the token rate)
    "small": (128, 3),  # 0.9 M parameters: trains on a CPU
    "paper": (384, 4),  # 10.6 M parameters, the width (384) of the authors' decoder
}


@dataclass
class TokenizerConfig:
    """Everything that decides a tokenizer's shape; stored as config.json."""

    levels: int = 6
    dims: int = 4
    channels: int = 32
    decoder: str = "small"
    format_version: int = FORMAT_VERSION

    @property
    def codes(self) -> int:
        return self.levels**self.dims


class ECGTokenizer(nn.Module):
    """Encoder + FSQ + decoder. Ids are `sum_i digit_i * levels**i`, always computed in float32 (bf16 flips about 5 % of them)."""

    # Fixed, the last batch padded: an ECG's ids must not depend on how many others are encoded with it. On a CPU
    # more than one at a time gains nothing (16: 141 ECG/s on one core, 1: 140).
    ENCODE_BATCH = {"cpu": 1, "cuda": 64}

    tokens_per_ecg = -(-SAMPLES // math.prod(Encoder.DOWNSAMPLING))  # 313

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        channels, blocks = DECODERS[config.decoder]
        self.encoder = Encoder(len(LEADS), config.channels, config.dims)
        self.decoder = Decoder(len(LEADS), channels, blocks, config.dims)

    def forward(self, ecg: torch.Tensor) -> torch.Tensor:
        """Mean squared reconstruction error of [B, 12, 5000] mV in units of each lead's variance, a scalar."""
        normalised, _, _ = normalise(ecg)
        codes = quantise(torch.sigmoid(self.encoder(normalised).float()), self.config.levels)
        return F.mse_loss(self.decoder(2 * codes - 1)[..., : ecg.shape[-1]], normalised)

    @torch.no_grad()
    def encode(self, ecg: np.ndarray) -> np.ndarray:
        """float32 [B, 12, 5000] or [12, 5000] (mV, 500 Hz, canonical leads) -> uint16 [B, 313] or [313].

        Raises ValueError for another shape, a type that is not floating point, or values that are not finite.
        """
        if ecg.shape[-2:] != (len(LEADS), SAMPLES) or ecg.ndim not in (2, 3):
            raise ValueError(f"ecg: expected [B, {len(LEADS)}, {SAMPLES}] at {SAMPLING_RATE} Hz, got {list(ecg.shape)}")
        if not np.issubdtype(ecg.dtype, np.floating):
            raise ValueError(f"ecg: expected floating point mV, got {ecg.dtype}")
        if not np.isfinite(ecg).all():
            raise ValueError("ecg: not finite; sharding.prepare quarantines such records")
        single, ecg = ecg.ndim == 2, ecg.reshape(-1, len(LEADS), SAMPLES)
        first = next(self.parameters())
        if first.dtype != torch.float32:
            raise ValueError(f"tokenizer: weights are {first.dtype}; ids are defined in float32")
        if first.device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # torch allows it for convolutions unless told not to: 10 bits of mantissa are no float32
        powers = self.config.levels ** torch.arange(self.config.dims, device=first.device)
        ids, batch = [], self.ENCODE_BATCH[first.device.type]
        for start in range(0, len(ecg), batch):
            chunk = torch.from_numpy(np.ascontiguousarray(ecg[start : start + batch], np.float32))
            padded = F.pad(chunk, (0, 0, 0, 0, 0, batch - len(chunk))) if len(chunk) < batch else chunk
            padded = padded.to(first.device)
            z = torch.sigmoid(self.encoder(normalise(padded)[0]))
            close = ((z * (self.config.levels - 1) % 1 - 0.5).abs() < TIE).flatten(1).any(1)
            close[len(chunk) :] = False
            if close.any():
                z[close] = self._in_float64(padded[close]).float()
            if not torch.isfinite(z).all():
                raise ValueError("ecg: the encoder's output is not finite; are these millivolts?")
            digits = torch.round(z * (self.config.levels - 1)).long()
            ids.append((digits * powers).sum(-1)[: len(chunk)].cpu().numpy().astype(np.uint16))
        ids = np.concatenate(ids) if ids else np.zeros((0, self.tokens_per_ecg), np.uint16)
        return ids[0] if single else ids

    def _in_float64(self, ecg: torch.Tensor) -> torch.Tensor:
        exact = {name: parameter.double() for name, parameter in self.encoder.named_parameters()}
        z = torch.sigmoid(functional_call(self.encoder, exact, (normalise(ecg.double())[0],)))
        # float32 could put it on the other side of the boundary again
        levels = self.config.levels - 1
        return torch.round(z * levels) / levels

    @torch.no_grad()
    def decode(self, ids: np.ndarray) -> np.ndarray:
        """uint16 [B, L] or [L] -> float32 [B, 12, 16 * L] (5,000 samples for 313 tokens) in standard deviations of each lead."""
        single, ids = ids.ndim == 1, np.atleast_2d(ids).astype(np.int64)
        if ids.size and ids.max() >= self.config.codes:
            raise ValueError(f"ids: {ids.max()} is not below the number of codes, {self.config.codes}")
        device = next(self.parameters()).device
        powers = self.config.levels ** torch.arange(self.config.dims, device=device)
        digits = torch.from_numpy(ids).to(device)[..., None] // powers % self.config.levels
        ecg = self.decoder(digits.float() * 2 / (self.config.levels - 1) - 1).cpu().numpy()[..., :SAMPLES]
        return ecg[0] if single else ecg

    def fingerprint(self) -> str:
        """16 hex digits over configuration and encoder weights: what decides the ids. Another decoder keeps the fingerprint."""
        digest = hashlib.sha256(json.dumps([FORMAT_VERSION, self.config.levels, self.config.dims, self.config.channels]).encode())
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors; each appears complete or not at all, config.json last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().cpu().float().contiguous() for k, v in self.state_dict().items()}
        save_file(state, folder / "model.safetensors.tmp")
        os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
        text = json.dumps({"model_type": "heartspeed_tokenizer", **asdict(self.config), "fingerprint": self.fingerprint()}, indent=2)
        (folder / "config.json.tmp").write_text(text + "\n")
        os.replace(folder / "config.json.tmp", folder / "config.json")

    @classmethod
    def from_pretrained(cls, folder: str | Path, flag: str = "--tokenizer") -> "ECGTokenizer":
        """Load a folder written by `save_pretrained`. Raises UserError naming `flag` and the mend."""
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise UserError(f"{flag}: {folder} has no {name}; train a tokenizer with launchers/train_tokenizer.py first")
        try:
            raw = json.loads((folder / "config.json").read_text())
            version = raw["format_version"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{flag}: {folder}/config.json is no tokenizer configuration; was this folder written by train_tokenizer?") from None
        if version != FORMAT_VERSION:
            raise UserError(f"{flag}: {folder} has format version {version}, this code reads {FORMAT_VERSION}; train it again")
        try:
            config = TokenizerConfig(**{k: raw[k] for k in asdict(TokenizerConfig())})
            tokenizer = cls(config)
            tokenizer.load_state_dict(load_file(folder / "model.safetensors"))
        except Exception as error:  # safetensors and torch raise many types for damaged files
            raise UserError(f"{flag}: {folder} does not load ({first_line(error)}); copy or train it again") from error
        return tokenizer.eval()

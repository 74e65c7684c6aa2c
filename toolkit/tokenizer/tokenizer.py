"""`ECGTokenizer`: 10 s of 12-lead ECG <-> 313 token ids, with `save_pretrained` / `from_pretrained`.

    tokenizer = ECGTokenizer.from_pretrained("runs/demo/tokenizer")
    ids = tokenizer.encode(ecg)            # uint16 [B, 313]
    ecg = tokenizer.decode(ids)            # float32 [B, 12, 5000], per-lead z-scores
"""

import copy
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from toolkit.ecg.leads import LEADS, SAMPLES, SAMPLING_RATE
from toolkit.errors import UserError, first_line
from toolkit.tokenizer import heartllm, heartspeed, paper
from toolkit.tokenizer.fsq import boundary_distance, codes_of, ids_of, quantise
from toolkit.tokenizer.normalise import STRIDE, running, zscore

FORMAT_VERSION = 2
ARCHITECTURES = {"heartspeed": heartspeed, "paper": paper, "heartllm": heartllm}
# Distance of an encoder output, in levels, to the boundary of two digits below which float64 decides. Float32 is off by 4e-6 at most (paper, 60 ECGs;
# heartspeed less), and by other amounts with other instruction sets: 3 of 1.5 M ids differed between AVX2 and AVX-512. One ECG in 40 is this close.
TIE = 1e-5
MODEL_TYPE = "heartspeed_tokenizer"  # in config.json


@dataclass
class TokenizerConfig:
    """Everything that decides a tokenizer's shape; stored as config.json. Raises UserError naming the argument that cannot be."""

    arch: str = "heartspeed"
    levels: list[int] = field(default_factory=lambda: [6, 6, 6, 6])
    causal: bool = False
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        if self.arch not in ARCHITECTURES:
            raise UserError(f"--arch: must be one of {', '.join(ARCHITECTURES)}, not {self.arch!r}")
        if not self.levels or not all(isinstance(n, int) and n >= 2 for n in self.levels) or self.codes > 2**16:
            raise UserError(f"--levels: needs 2 or more levels in each dimension and at most 65,536 codes (ids are uint16), not {self.levels}")
        if self.causal and self.arch != "heartspeed":
            raise UserError(f"--causal: --arch {self.arch} normalises over the whole record, future included; only heartspeed can do without")

    @property
    def codes(self) -> int:
        return math.prod(self.levels)


class ECGTokenizer(nn.Module):
    """Encoder + FSQ + decoder. Ids are those of toolkit/tokenizer/fsq.py, always computed in float32 (bf16 flips about 5 % of them).

    Where an output lies within 1e-5 of the boundary of two digits, float64 decides, so that ids are the same on any machine and in any batch.
    Not so with the architecture heartllm, which computes as the authors' release does, bit for bit, and depends on how many are encoded together
    as that does: by 2e-6 before the sigmoid (no id of 240 ECGs differed between one and ten at a time).
    """

    ENCODE_BATCH = {"cpu": 4, "cuda": 64}  # one core: 1 at a time 165 ECG/s, 4 192, 16 184
    HEARTLLM_BATCH = 256  # all that are given at once, as far as memory goes

    tokens_per_ecg = -(-SAMPLES // STRIDE)  # 313

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        room, shape = ARCHITECTURES[config.arch], (len(LEADS), len(config.levels))
        self.encoder = room.Encoder(*shape, config.causal) if config.arch == "heartspeed" else room.Encoder(*shape)
        self.decoder = room.Decoder(*shape)

    def normalise(self, ecg: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float [B, 12, T] mV -> (float32 [B, 12, T], mean, SD): what the encoder reads and the decoder writes is (ecg - mean) / SD."""
        if self.config.causal:
            return running(ecg)[:3]
        return zscore(ecg, floor=0) if self.config.arch == "heartllm" else zscore(ecg)

    def forward(self, ecg: torch.Tensor, target: torch.Tensor | None = None, bf16: bool = False) -> torch.Tensor:
        """Mean squared error of the reconstruction of [B, 12, 5000] mV in units of each lead's variance, a scalar.

        target: what to reconstruct, if it is not `ecg` itself but what `ecg` was before noise was added. bf16: matrix products and convolutions
        in bfloat16, quantiser and error in float32.
        """
        x = self.normalise(ecg)[0]
        wanted = x if target is None else self.normalise(target)[0]
        device = ecg.device.type
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            z = self.encoder(x)
            with torch.autocast(device, enabled=False):
                codes = quantise(torch.sigmoid(z.float()), self.config.levels)
            made = self.decoder(codes)
        return F.mse_loss(made[..., : ecg.shape[-1]].float(), wanted)

    @torch.no_grad()
    def encode(self, ecg: np.ndarray, sampling_rate: float = SAMPLING_RATE) -> np.ndarray:
        """float [B, 12, 5000] or [12, 5000] (mV, 500 Hz, canonical leads) -> uint16 [B, 313] or [313].

        Raises ValueError for another shape or sampling rate, a type that is not floating point, or values that are not finite.
        """
        single, ecg = np.ndim(ecg) == 2, _checked(ecg, sampling_rate)
        first = self._first()
        ids, batch = [], self.HEARTLLM_BATCH if self.config.arch == "heartllm" else self.ENCODE_BATCH[first.device.type]
        for start in range(0, len(ecg), batch):
            chunk = torch.from_numpy(np.ascontiguousarray(ecg[start : start + batch])).to(first.device)
            ids.append(self.ids_of_normalised(self.normalise(chunk)[0]).cpu().numpy().astype(np.uint16))
        ids = np.concatenate(ids) if ids else np.zeros((0, self.tokens_per_ecg), np.uint16)
        return ids[0] if single else ids

    @torch.no_grad()
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def features(self, ecg: np.ndarray, sampling_rate: float = SAMPLING_RATE) -> np.ndarray:
        """float [B, 12, 5000] (mV, 500 Hz, canonical leads) -> float32 [B, 313, D]: of each token what the encoder knows before it makes a code of it, the
        input of its `to_code`. One ECG at a time, so that no last bit depends on the batch. Raises as `encode`.
        """
        ecg, first = _checked(ecg, sampling_rate), self._first()
        width = self.encoder.to_code.in_features
        encoder = copy.copy(self.encoder)  # with the identity for its last layer, beside the encoder itself: other threads may be using that
        encoder._modules = {**self.encoder._modules, "to_code": nn.utils.skip_init(nn.Linear, width, width, device=first.device)}
        nn.init.eye_(encoder.to_code.weight)
        nn.init.zeros_(encoder.to_code.bias)
        compute = encoder.as_released if self.config.arch == "heartllm" else encoder
        rows = [compute(self.normalise(torch.from_numpy(one[None]).to(first.device))[0])[0].cpu().numpy() for one in ecg]
        return np.stack(rows) if rows else np.zeros((0, self.tokens_per_ecg, width), np.float32)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)  # ids are float32, whatever a caller is in
    def ids_of_normalised(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [B, 12, T] as `normalise` gives it -> int64 [B, L]. Raises ValueError if the encoder's output is not finite."""
        if self.config.arch == "heartllm":
            z = torch.sigmoid(self.encoder.as_released(x))
        else:
            z = torch.sigmoid(self.encoder(x))
            close = (boundary_distance(z, self.config.levels) < TIE).flatten(1).any(1)
            if close.any():
                exact = {name: parameter.double() for name, parameter in self.encoder.named_parameters()}
                z = z.double()
                z[close] = torch.sigmoid(functional_call(self.encoder, exact, (x[close].double(),)))
        if not torch.isfinite(z).all():
            raise ValueError("ecg: the encoder's output is not finite; are these millivolts?")
        return ids_of(z, self.config.levels)

    @torch.no_grad()
    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Integers [B, L] or [L] -> float32 [B, 12, n] in standard deviations of each lead, n = 5,000 for L = 313, the most there is.

        Raises ValueError for what are no ids of this tokenizer.
        """
        single, ids = np.ndim(ids) == 1, np.atleast_2d(ids)
        if not np.issubdtype(ids.dtype, np.integer) or (ids.size and not 0 <= ids.min() <= ids.max() < self.config.codes):
            raise ValueError(f"ids: expected integers from 0 to {self.config.codes - 1}, got {ids.dtype} from {ids.min()} to {ids.max()}")
        ids = torch.from_numpy(ids.astype(np.int64)).to(next(self.parameters()).device)
        ecg = self.decoder(codes_of(ids, self.config.levels)).cpu().numpy()[..., :SAMPLES]
        return ecg[0] if single else ecg

    @torch.no_grad()
    def reconstruct(self, ecg: np.ndarray, sampling_rate: float = SAMPLING_RATE) -> tuple[np.ndarray, np.ndarray]:
        """float [B, 12, 5000] mV or one ECG -> (ids as `encode`, reconstruction float32 in the shape of `ecg`, mV, with the leads' own mean and SD)."""
        ids = self.encode(ecg, sampling_rate)
        _, mean, std = self.normalise(torch.from_numpy(_checked(ecg, sampling_rate)))
        return ids, (self.decode(ids) * std.numpy() + mean.numpy()).astype(np.float32).reshape(np.shape(ecg))

    def fingerprint(self) -> str:
        """16 hex digits over configuration and encoder weights: what decides the ids. Another decoder keeps the fingerprint."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
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
        text = json.dumps({"model_type": MODEL_TYPE, **asdict(self.config), "fingerprint": self.fingerprint()}, indent=2)
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
        if tokenizer.fingerprint() != raw.get("fingerprint"):  # one flipped bit is another tokenizer
            raise UserError(f"{flag}: {folder} is damaged: its configuration and encoder are not those that were saved; copy or train it again")
        return tokenizer.eval()

    @classmethod
    def from_heartllm(cls, path: str | Path) -> "ECGTokenizer":
        """Load the `best.pt` of the authors' release. Raises UserError naming the file."""
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; name the best.pt of the HeartLLM release")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)  # a pickle is a program: nothing but tensors is taken from it
        except Exception as error:  # torch raises many types, and its text advises to trust the file
            raise UserError(f"{path} is no tokenizer of the HeartLLM release: not a file of nothing but tensors and numbers") from error
        try:
            tokenizer, state = cls(TokenizerConfig(arch="heartllm")), heartllm.from_release(saved["model"])
            unlike = sorted(tokenizer.state_dict().keys() ^ state.keys())
            if unlike:
                raise ValueError(f"{unlike[0]} is {'missing' if unlike[0] not in state else 'unknown'}")
            tokenizer.load_state_dict(state)
        except Exception as error:
            raise UserError(f"{path} is no tokenizer of the HeartLLM release, tensors under the key 'model' ({first_line(error)})") from error
        return tokenizer.eval()

    def _first(self) -> torch.Tensor:
        first = next(self.parameters())
        if first.dtype != torch.float32:
            raise ValueError(f"tokenizer: weights are {first.dtype}; ids are defined in float32")
        if first.device.type == "cuda":
            # torch allows TF32 for convolutions unless told not to: 10 bits of mantissa are no float32
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        return first


def _checked(ecg: np.ndarray, sampling_rate: float) -> np.ndarray:
    """[B, 12, 5000] float32 of one ECG or several. Raises ValueError naming what was expected."""
    ecg = np.asarray(ecg)
    if sampling_rate != SAMPLING_RATE:
        raise ValueError(f"ecg: expected {SAMPLING_RATE} Hz, got {sampling_rate:g}; toolkit.ecg.records.read_record resamples")
    if ecg.ndim not in (2, 3) or ecg.shape[-2:] != (len(LEADS), SAMPLES):
        raise ValueError(f"ecg: expected [B, {len(LEADS)}, {SAMPLES}], 10 s at {SAMPLING_RATE} Hz, got {list(ecg.shape)}")
    if not np.issubdtype(ecg.dtype, np.floating):
        raise ValueError(f"ecg: expected floating point mV, got {ecg.dtype}; subtract the ADC's baseline and divide by its gain first")
    with np.errstate(over="ignore"):  # 1e39 becomes an infinity
        ecg = ecg.astype(np.float32, copy=False)
    if not np.isfinite(ecg).all():
        raise ValueError("ecg: expected finite values, got NaN or infinity; sharding.prepare quarantines such records")
    return ecg.reshape(-1, len(LEADS), SAMPLES)

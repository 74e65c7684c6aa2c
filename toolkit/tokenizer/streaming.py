"""Tokens of a live 12-lead signal, each as soon as its last sample is there; the ids are those of `ECGTokenizer.encode`, bit for bit.

    stream = StreamingTokenizer(ECGTokenizer.from_pretrained("runs/demo/causal"))
    ids = stream.push(samples)             # float [12, n] mV, 500 Hz -> uint16 [k]

    python -m toolkit.tokenizer.streaming --tokenizer T --record records500/00000/00017_hr

shows a record as if it were live (toolkit/tokenizer/live.py). The tokenizer must be causal (launchers/train_tokenizer.py --causal true).
"""

import numpy as np
import torch

from toolkit.ecg.leads import LEADS, SAMPLING_RATE
from toolkit.errors import UserError
from toolkit.tokenizer import heartspeed
from toolkit.tokenizer.normalise import LEFT, STRIDE, running
from toolkit.tokenizer.tokenizer import ECGTokenizer

AT_ONCE = 313  # tokens; a longer push is cut, so that memory stays the same
# Samples before a token that can still change it, rounded up so that with LEFT they are whole tokens.
HISTORY = STRIDE * (-(-(heartspeed.PATCH - STRIDE) // STRIDE) + heartspeed.ENCODER_BLOCKS * (heartspeed.KERNEL - 1)) + STRIDE - LEFT


class StreamingTokenizer:
    """`push(samples) -> ids` for a signal without end. State: 15 samples at most, HISTORY normalised ones, and the running sums of each lead.

    Token k, from 0, is complete with sample 16 k + 8, counted from 1, so that the first 5,000 samples are 313 tokens. Raises ValueError for a
    tokenizer that is not causal, not on the CPU or not in float32, and for another sampling rate.
    """

    def __init__(self, tokenizer: ECGTokenizer, sampling_rate: float = SAMPLING_RATE):
        if not tokenizer.config.causal:
            raise UserError("--tokenizer: its tokens depend on samples that are still to come; train one with --causal true")
        if sampling_rate != SAMPLING_RATE:
            raise ValueError(f"sampling_rate: expected {SAMPLING_RATE} Hz, got {sampling_rate:g}; resample the signal first")
        first = next(tokenizer.parameters())
        if first.dtype != torch.float32 or first.device.type != "cpu":
            raise ValueError(f"tokenizer: weights are {first.dtype} on {first.device}; a stream needs float32 on the CPU: tokenizer.float().cpu()")
        self.tokenizer = tokenizer
        self.waiting = np.zeros((len(LEADS), 0), np.float32)  # samples of a token that is not complete
        self.sums: torch.Tensor | None = None  # of `running`
        self.history = torch.zeros(1, len(LEADS), 0)

    @torch.no_grad()
    def push(self, samples: np.ndarray) -> np.ndarray:
        """float [12, n] mV, any n -> uint16 [k], the tokens that these samples complete.

        Raises ValueError for another shape, integers, or values that are not finite in float32; the stream then stands where it stood before.
        """
        signal = np.concatenate([self.waiting, _checked(samples)], 1)
        ids, start, sums, history = [np.zeros(0, np.uint16)], 0, self.sums, self.history
        while tokens := min(complete(signal.shape[1] - start, sums is None), AT_ONCE):
            end = start + tokens * STRIDE - (LEFT if sums is None else 0)
            x, _, _, sums = running(torch.from_numpy(signal[None, :, start:end]), sums)
            x = torch.cat([history, x], -1)
            ids.append(self.tokenizer.ids_of_normalised(x)[0, -tokens:].numpy().astype(np.uint16))
            start, history = end, x[..., -HISTORY:]
        self.waiting, self.history = signal[:, start:].copy(), history.clone()  # copies: a part would keep the whole
        self.sums = None if sums is None else sums.clone()
        return np.concatenate(ids)


def complete(samples: int, beginning: bool = True) -> int:
    """Tokens that so many samples complete, from the beginning of a stream or after a whole token."""
    return (samples + (LEFT if beginning else 0)) // STRIDE


def _checked(samples: np.ndarray) -> np.ndarray:
    """float32 [12, n]. Raises ValueError naming what was expected."""
    samples = np.asarray(samples)
    if samples.ndim != 2 or len(samples) != len(LEADS):
        raise ValueError(f"samples: expected [{len(LEADS)}, n] at {SAMPLING_RATE} Hz, got {list(samples.shape)}")
    if not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(f"samples: expected floating point mV, got {samples.dtype}; subtract the ADC's baseline and divide by its gain first")
    with np.errstate(over="ignore"):  # 1e39 becomes an infinity, which would stay in the running sums for ever
        samples = samples.astype(np.float32, copy=False)
    if not np.isfinite(samples).all():
        raise ValueError("samples: expected finite values, got NaN or infinity; push 0 while an electrode is off")
    return samples


if __name__ == "__main__":
    from toolkit.tokenizer.live import main

    main()

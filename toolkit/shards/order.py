"""Position in the data is arithmetic: (seed, position) decides the sample, whatever the world size.

The stream of samples is endless: epoch e is a permutation of the n samples drawn from (seed, e), and epochs follow each other without a
gap, so a global batch may straddle two epochs and every rank always gets the same number of samples. A step consumes the positions
[cursor, cursor + global batch); rank r of w takes a fixed part of it. Resuming is O(1): the cursor is all there is to remember.

A mixture has several such streams. Of every 1,000 positions each stream gets its share, exactly, in an order drawn from (seed, number of the 1,000).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np


@dataclass
class MicroBatch:
    """What one forward pass takes, and the counts that the loop adds up."""

    inputs: Any
    targets: int  # what the loss is divided by
    tokens: int
    ecgs: int


class Data(Protocol):
    """`len()` is the number of training samples; `at` says which of them, as (epoch, index), is at a position; `batch` makes a micro-batch of some of
    them; `key` names one.

    samples_per_row: a micro-batch has `per_device_train_batch_size` rows of so many samples.
    """

    samples_per_row: int

    def __len__(self) -> int: ...

    def at(self, seed: int, position: int) -> tuple[int, int]: ...

    def key(self, index: int) -> str: ...

    def batch(self, samples: list[tuple[int, int]]) -> MicroBatch: ...


BLOCK = 1000  # positions in which the shares of a mixture are exact
ARRANGEMENT = 1 << 24  # in the place of a stream's number: what the order of a block is drawn from


@lru_cache(maxsize=16)
def _permutation(seed: int, epoch: int, n: int, stream: int = 0) -> np.ndarray:
    key = [seed, epoch + (stream << 32)]
    return np.random.Generator(np.random.Philox(key=key)).permutation(n)  # 58 ms for n = 800,000, once an epoch


def sample_at(seed: int, n: int, position: int, stream: int = 0) -> tuple[int, int]:
    """(epoch, index) of the sample at a position of the endless stream over n samples."""
    epoch, offset = divmod(position, n)
    return epoch, int(_permutation(seed, epoch, n, stream)[offset])


def mixed_at(seed: int, sizes: list[int], counts: tuple[int, ...], position: int) -> tuple[int, int, int]:
    """(stream, epoch of the stream, index in it) at a position of a mixture of streams of `sizes` samples, each `counts` times in a block (`block_counts`)."""
    block, offset = divmod(position, BLOCK)
    stream, before = (int(part[offset]) for part in _arrangement(seed, block, counts))
    return (stream, *sample_at(seed, sizes[stream], block * counts[stream] + before, stream))


@lru_cache(maxsize=16)
def _arrangement(seed: int, block: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """For each place of a block its stream, and how many places of that stream come before it in the block."""
    streams = np.repeat(np.arange(len(counts)), counts)[_permutation(seed, block, BLOCK, ARRANGEMENT)]
    before = np.empty_like(streams)
    for stream, count in enumerate(counts):
        before[streams == stream] = np.arange(count)
    return streams, before


def block_counts(weights: list[float]) -> tuple[int, ...]:
    """How many of the `BLOCK` positions each stream gets, by largest remainders. Raises ValueError where one would get none."""
    exact = BLOCK * np.array(weights, float) / sum(weights)
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]] += 1
    if counts.min() < 1:
        raise ValueError(f"a share is less than one in {BLOCK}")
    return tuple(counts.tolist())


def spaced(n: int, limit: int) -> list[int]:
    """At most `limit` of n samples, evenly spaced: the first ones would be the oldest recordings."""
    return [i * n // min(n, limit) for i in range(min(n, limit))]


def micro_batches(cursor: int, micro_batch: int, accumulation: int, rank: int, world: int) -> list[range]:
    """Positions of each micro-batch of rank `rank` in the step that starts at `cursor`; over the ranks they tile the global batch."""
    starts = (cursor + (i * world + rank) * micro_batch for i in range(accumulation))
    return [range(start, start + micro_batch) for start in starts]

"""Mean loss on a fixed set, the same for any number of ranks."""

import math
from collections.abc import Callable

import torch

from toolkit.shards.order import Data, spaced
from toolkit.training.distributed import Ranks, sum_over_ranks


@torch.no_grad()
def mean_loss(engine, data: Data, loss: Callable, ranks: Ranks, limit: int, batch_size: int) -> float:
    """Summed loss over the `limit` evenly spaced ECGs of `data`, divided by its targets (NaN if there is none); collective."""
    chosen = spaced(len(data), limit)
    mine, most = chosen[ranks.rank :: ranks.world], -(-len(chosen) // ranks.world)
    summed, targets = 0.0, 0
    for start in range(0, most, batch_size):  # as many forwards on every rank: under ZeRO-3 each is a collective
        part = mine[start : start + batch_size]
        batch = data.batch([(0, i) for i in part or chosen[:1]])
        value = loss(engine, batch.inputs).item()
        if part:
            summed, targets = summed + value, targets + batch.targets
    summed, targets = sum_over_ranks([summed, targets], ranks.device)
    return summed / targets if targets else math.nan

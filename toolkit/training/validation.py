"""Mean loss on a fixed set, the same for any number of ranks."""

from collections.abc import Callable

import torch

from toolkit.shards.order import Data
from toolkit.training.distributed import Ranks, sum_over_ranks


def fixed_subset(n: int, limit: int) -> list[int]:
    """At most `limit` of n samples, evenly spaced: the first ones would be the oldest recordings."""
    return [i * n // min(n, limit) for i in range(min(n, limit))]


@torch.no_grad()
def mean_loss(engine, data: Data, loss: Callable, ranks: Ranks, limit: int, batch_size: int) -> float:
    """Summed loss over `fixed_subset` of `data`, divided by its targets; collective."""
    mine = [(0, i) for i in fixed_subset(len(data), limit)[ranks.rank :: ranks.world]]
    summed, targets = 0.0, 0
    for start in range(0, len(mine), batch_size):
        batch = data.batch(mine[start : start + batch_size])
        summed += loss(engine, batch.inputs).item()
        targets += batch.targets
    summed, targets = sum_over_ranks([summed, targets], ranks.device)
    return summed / targets

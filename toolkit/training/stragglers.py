"""What each rank takes for its own part of a step: one gather for each log line, to TensorBoard as ranks/NAME/rank_N, and a warning that names a slow rank.

A step takes all ranks equally long, as each waits for the slowest. What tells them apart is the time outside of collectives: computing, and waiting for data.
On a GPU, whose collectives are no waiting of the CPU's, computing is the forward passes alone, by CUDA events; under ZeRO-3 these contain gathers, in which
the ranks wait for each other, so there only the data wait tells.
"""

import statistics
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from toolkit.training import heartbeat
from toolkit.training.distributed import Ranks

NAMES = ("step_seconds", "compute_seconds", "data_wait_seconds", "collective_seconds", "memory_gb")
EACH = 16  # more ranks have no curve each
SLOW, SEVERAL = 1.2, 3  # a rank whose skew is above, in so many log lines on end, is named

Table = list[list[float]]  # [ranks][NAMES]
Streak = tuple[int, int]  # the rank that was the slowest, and in how many log lines on end it was slow
NONE: Streak = (-1, 0)


def gather(own: list[float], ranks: Ranks) -> Table:
    """Collective. What all ranks say, by rank. own: this rank's numbers, in the order of NAMES."""
    mine = torch.tensor(own, dtype=torch.float64, device=ranks.device)
    table = [torch.empty_like(mine) for _ in range(ranks.world)]
    dist.all_gather(table, mine)
    return [row.tolist() for row in table]


def skew(table: Table) -> float | None:
    """Seconds a step of the slowest rank, computing and waiting for data, over those of the median rank (of two: the faster one). None of one rank alone."""
    own = _own(table)
    return max(own) / max(statistics.median_low(own), 1e-9) if len(own) > 1 else None


def scalars(table: Table) -> dict[str, float]:
    """TensorBoard's tags and numbers: a curve for each rank; of more than 16 ranks min, median and max, and the number of the slowest rank."""
    columns = dict(zip(NAMES, zip(*table)))
    if len(table) <= EACH:
        return {f"ranks/{name}/rank_{rank}": value for name, column in columns.items() for rank, value in enumerate(column)}
    over = {"min": min, "median": statistics.median, "max": max}
    return {f"ranks/{name}/{how}": of(column) for name, column in columns.items() for how, of in over.items()} | {"ranks/slowest": _slowest(table)}


def warn(streak: Streak, table: Table, folder: Path) -> Streak:
    """Name the slowest rank, once, when it was slow in several log lines on end. Returns the streak with this line in it."""
    rank, times = _slowest(table), skew(table)
    if times is None or times <= SLOW:
        return NONE
    streak = (rank, streak[1] + 1 if streak[0] == rank else 1)
    if streak[1] == SEVERAL:
        host = (heartbeat.read(folder, rank) or {"host": "unknown"})["host"]
        _, compute, waited, *_ = table[rank]
        tqdm.write(
            f"WARNING: rank {rank} on {host} is slow, and all others wait for it: its own part of a step takes {times:.2f} times as long as the median rank's"
            f" ({compute:.3g} s computing, {waited:.3g} s waiting for data), in {SEVERAL} log lines on end"
        )
    return streak


def _own(table: Table) -> list[float]:
    return [compute + waited for _, compute, waited, *_ in table]


def _slowest(table: Table) -> int:
    own = _own(table)
    return own.index(max(own))

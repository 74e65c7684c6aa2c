"""What this process does in torch.distributed: name, number and bytes of its last collective, and the seconds spent in all of them.

DeepSpeed's collectives and ours end in the functions of torch.distributed, so these are wrapped. Over gloo a rank that is ahead waits inside of them, so the
seconds are what it waits for others, and what the transfer takes. Over NCCL they only enqueue and return: there the seconds are no waiting time, the number
still says how far a rank has come. A call costs 2 us more (all_reduce of 10 numbers over gloo takes 16 us in a
world of one).
"""

import functools
import time
from dataclasses import dataclass

import deepspeed.comm.comm as of_deepspeed
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

NAMES = (
    "all_reduce", "all_reduce_coalesced", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "gather", "scatter",
    "reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "barrier",
    "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list",
)  # fmt: skip


@dataclass
class Last:
    """name, number (from 1, the same on all ranks) and bytes (of the largest tensor or list of tensors; 0 of objects) of the last collective; whether the
    process is inside of it, since when (or since when no longer; time.perf_counter); seconds inside of all so far."""

    name: str = ""
    number: int = 0
    bytes: int = 0
    inside: bool = False
    since: float = 0.0
    seconds: float = 0.0


LAST = Last()


def record() -> None:
    """Wrap the collectives of this process; a second call does nothing. To be called after the process group is there."""
    if hasattr(dist.Work.wait, "recorded"):
        return
    for name in NAMES:
        wrapped = _recorded(getattr(dist, name), name)
        setattr(dist, name, wrapped)
        setattr(c10d, name, wrapped)  # DeepSpeed calls some there
    dist.Work.wait = _recorded(dist.Work.wait, None)
    if of_deepspeed.cdb is not None:  # it took these two when the process group was made
        of_deepspeed.cdb.all_gather_function = dist.all_gather_into_tensor
        of_deepspeed.cdb.reduce_scatter_function = dist.reduce_scatter_tensor


def _recorded(function, name: str | None):
    """name None: the wait for a collective that was started before, which is counted already."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if LAST.inside:  # a collective made of others
            return function(*args, **kwargs)
        if name:
            LAST.name, LAST.number, LAST.bytes = name, LAST.number + 1, _largest(args, kwargs)
        LAST.inside, LAST.since = True, time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            now = time.perf_counter()
            LAST.seconds += now - LAST.since
            LAST.inside, LAST.since = False, now

    call.recorded = True
    return call


def _largest(args: tuple, kwargs: dict) -> int:
    return max((_bytes(value) for value in (*args, *kwargs.values())), default=0)


def _bytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor) else 0

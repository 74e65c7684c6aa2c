"""Speed between ranks: all-reduce, pairs, and how far the clocks are apart. All of it collective."""

import itertools
import statistics
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from toolkit.doctor.finding import Finding, ok, warning
from toolkit.training.distributed import Ranks

SIZES = {"cpu": (1 << 16, 1 << 20, 1 << 24), "gpu": (1 << 16, 1 << 20, 1 << 24, 1 << 28)}  # bytes
SECONDS = 2.0  # a size is repeated for about so long, at most REPEATS times
REPEATS, TRIPS = 20, 20
TOO_LONG = 10.0  # s that one all-reduce of the next size may take
ALL_PAIRS = 16  # ranks up to which every pair is looked at: 120 pairs, one after another; beyond them each rank and the next, in a ring
SLOW = 4  # times slower than the others of its kind


def clocks(ranks: Ranks, others: list[int]) -> list[dict]:
    """On rank 0 [{"rank", "ahead_s", "within_s"}] for each of `others`, [] elsewhere.

    Of TRIPS round trips the quickest counts, and its middle is taken for the moment of the answer: off by at most half of it (Cristian, Probabilistic clock
    synchronization, 1989).
    """
    found, message = [], torch.zeros(1, dtype=torch.float64, device=ranks.device)
    for other in others:
        trips = []
        for _ in range(TRIPS):
            if ranks.main:
                sent = time.time()
                dist.send(message, other)
                dist.recv(message, other)
                trips.append((sent, message.item(), time.time()))
            elif ranks.rank == other:
                dist.recv(message, 0)
                message.fill_(time.time())
                dist.send(message, 0)
        if ranks.main:
            ahead, within = offset(trips)
            found.append({"rank": other, "ahead_s": ahead, "within_s": within})
    return found


def offset(trips: list[tuple[float, float, float]]) -> tuple[float, float]:
    """(seconds that the other clock is ahead, how exactly that is known) from (sent, the other's time, received)."""
    sent, theirs, received = min(trips, key=lambda trip: trip[2] - trip[0])
    return theirs - (sent + received) / 2, (received - sent) / 2


def all_reduce(ranks: Ranks) -> list[dict]:
    """[{"bytes", "seconds", "algorithm_gb_s", "bus_gb_s", "right"}], the same on all ranks; seconds are of the slowest rank.

    Algorithm bandwidth is S / t, for bus bandwidth see `bus_share`. Sums are of small whole numbers, exact in float32.
    """
    rows, expected = [], 0.0
    for size in SIZES["cpu" if ranks.device.type == "cpu" else "gpu"]:
        if expected > TOO_LONG:
            break
        pattern = (torch.arange(size // 4, device=ranks.device) % 13).float()
        summed = pattern * (ranks.rank + 1)
        dist.all_reduce(summed)  # the first one connects
        right = torch.equal(summed, pattern * (ranks.world * (ranks.world + 1) // 2))
        once, wrong = _slowest(ranks, [_seconds(ranks, summed.zero_(), 1), float(not right)])
        repeats = max(1, min(REPEATS, int(SECONDS / max(once, 1e-9))))
        (seconds,) = _slowest(ranks, [_seconds(ranks, summed, repeats)])
        rate = size / seconds / 1e9
        rows.append({"bytes": size, "seconds": seconds, "algorithm_gb_s": rate, "bus_gb_s": rate * bus_share(ranks.world), "right": not wrong})
        expected = 16 * seconds
    return rows


def bus_share(world: int) -> float:
    """Bytes that each rank has to send, and to receive, per byte of an all-reduce: 2 (n - 1) / n. Bus bandwidth is algorithm bandwidth times this, and compares
    with the speed of a link, whatever n is (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
    """
    return 2 * (world - 1) / world


def _slowest(ranks: Ranks, values: list[float]) -> list[float]:
    """Element-wise maximum over the ranks, the same on all."""
    tensor = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def _seconds(ranks: Ranks, tensor: torch.Tensor, repeats: int) -> float:
    """Of one all-reduce, the mean of `repeats`."""
    dist.barrier()
    started = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(tensor)
    if ranks.device.type != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def pairs(ranks: Ranks, seconds: float) -> list[dict]:
    """[{"ranks": [a, b], "latency_s", "gb_s"}] of the pairs whose first rank this is: half of the quickest round trip of 4 bytes, and the rate of the quickest
    of some MB to and fro. One pair after another, the others wait. seconds: for all of them; each has its share, and two trips of each size at least.
    """
    every, found = pairs_of(ranks.world), []
    size, share = 1 << (22 if ranks.device.type == "cpu" else 24), seconds / len(every) / 2
    small, large = (torch.zeros(n // 4, device=ranks.device) for n in (4, size))
    for a, b in every:
        if ranks.rank in (a, b):
            ping, bulk = (_quickest(ranks, tensor, a, b, n, share) for tensor, n in ((small, TRIPS), (large, 4)))
            if ranks.rank == a:
                found.append({"ranks": [a, b], "latency_s": ping / 2, "gb_s": 2 * size / bulk / 1e9})
        dist.barrier()
    return found


def pairs_of(world: int) -> list[tuple[int, int]]:
    """The pairs that are looked at. In a ring each rank is in two of them, which tells a slow rank from a slow way."""
    return list(itertools.combinations(range(world), 2)) if world <= ALL_PAIRS else [(rank, (rank + 1) % world) for rank in range(world)]


def _quickest(ranks: Ranks, tensor: torch.Tensor, a: int, b: int, most: int, share: float) -> float:
    """Seconds of the quickest of two to `most` round trips; a ends them when its share of the time is over, and says so in the message."""
    times: list[float] = []
    tensor[0] = 0.0
    while not tensor[0]:
        if ranks.rank == a:
            tensor[0] = float(len(times) + 1 == most or (len(times) > 0 and sum(times) + times[-1] > share))
        times.append(_round_trip(ranks, tensor, a, b))
    return min(times)


def _round_trip(ranks: Ranks, tensor: torch.Tensor, a: int, b: int) -> float:
    started = time.perf_counter()
    if ranks.rank == a:
        dist.send(tensor, b)
        dist.recv(tensor, b)
    else:
        dist.recv(tensor, a)
        dist.send(tensor, a)
    if ranks.device.type != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def said_of_pairs(measured: list[dict], hosts: dict[str, list[int]]) -> Iterator[Finding]:
    """Names ranks and pairs that are SLOW times slower than others of their kind (within a node, between nodes).

    A rank is slow if it is in more than one pair and even the quickest of them is slow, against the median of the ranks' quickest ones; a pair against the
    median of pairs without slow ranks. So two GPUs with a link of their own do not make all the others look slow.
    """
    host_of = {rank: host for host, members in hosts.items() for rank in members}
    bad = False
    for kind, within in (("within a node", True), ("between nodes", False)):
        rates = {tuple(pair["ranks"]): pair["gb_s"] for pair in measured if (host_of[pair["ranks"][0]] == host_of[pair["ranks"][1]]) == within}
        if not rates:
            continue
        best = {rank: max(rate for pair, rate in rates.items() if rank in pair) for rank in sorted({rank for pair in rates for rank in pair})}
        usual = statistics.median(best.values())
        slow = [rank for rank, rate in best.items() if rate < usual / SLOW and sum(rank in pair for pair in rates) > 1]
        for rank in slow:
            bad = True
            yield warning(
                "pairs", f"rank {rank} ({host_of[rank]}) is slow with all others {kind}: {best[rank]:.3g} GB/s at best, they have {usual:.3g}",
                f"take {host_of[rank]} out (--exclude) or look at its network card, cable and GPU",
            )  # fmt: skip
        others = {pair: rate for pair, rate in rates.items() if not set(pair) & set(slow)}
        usual = statistics.median(others.values()) if others else 0
        for (a, b), rate in others.items():
            if rate < usual / SLOW:
                bad = True
                yield warning(
                    "pairs", f"ranks {a} ({host_of[a]}) and {b} ({host_of[b]}) {kind}: {rate:.3g} GB/s, others have {usual:.3g}",
                    f"look at the way between them: {'nvidia-smi topo -m' if within else 'cables, switch, NCCL_SOCKET_IFNAME'}",
                )  # fmt: skip
    if not bad and measured:
        latency = [1e6 * pair["latency_s"] for pair in measured]
        rates = [pair["gb_s"] for pair in measured]
        some = "" if len(measured) == 1 else f" to {max(latency):.0f}", "" if len(measured) == 1 else f" to {max(rates):.3g}"
        yield ok("pairs", f"{len(measured)} pair{'s' * (len(measured) > 1)}: {min(latency):.0f}{some[0]} us, {min(rates):.3g}{some[1]} GB/s")

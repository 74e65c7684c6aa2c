"""Between the ranks: who answers, who runs where, clocks, the speed of all-reduce and of each pair.

The roll is called through the key-value store of rank 0 before any collective, and every wait has an end, so that one rank that hangs is named.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from toolkit.doctor.finding import Finding, error, ok, warning
from toolkit.doctor.links import all_reduce, clocks, pairs, said_of_pairs
from toolkit.doctor.shared_folder import hold, look, said_of_folder
from toolkit.errors import first_line
from toolkit.spans import spans
from toolkit.training.distributed import Ranks, start

SKEW, REFUSED = 1.0, 300.0  # s: heartbeats and logs of nodes no longer compare; munge, and with it SLURM, refuses credentials (TTL 300 s)
BEAT, DONE = 0.5, "done"  # s between two signs of life


def open_store(rank: int, world: int, timeout: float) -> dist.TCPStore:
    """The store of MASTER_ADDR:MASTER_PORT, which rank 0 opens (under torchrun its agent has). Raises RuntimeError where it does not answer in time."""
    serve = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, serve, timedelta(seconds=timeout), wait_for_workers=False)


def silent(store: dist.TCPStore, what: str, world: int, timeout: float) -> list[int]:
    """Waits for the key what/N of every rank; the ranks whose key is not there after `timeout` seconds."""
    end = time.monotonic() + timeout
    while missing := [rank for rank in range(world) if not store.check([f"doctor/{what}/{rank}"])]:
        if time.monotonic() > end:
            return missing
        time.sleep(0.05)
    return []


def tell(store: dist.TCPStore, what: str, value) -> None:
    store.set(f"doctor/{what}", json.dumps(value))


def told(store: dist.TCPStore, what: str, timeout: float = 10):
    """Raises RuntimeError where it was not told in time."""
    store.wait([f"doctor/{what}"], timedelta(seconds=timeout))
    return json.loads(store.get(f"doctor/{what}"))


def facts(local_rank: int, versions: dict[str, str]) -> dict:
    """What one rank says of itself to be compared with the others."""
    gpu = (
        str(torch.cuda.get_device_properties(local_rank).uuid) if get_accelerator().device_name() == "cuda" and local_rank < torch.cuda.device_count() else None
    )
    return {"host": os.uname().nodename, "gpu": gpu, "device": get_accelerator().device_name(), "versions": versions}


def compare(by_rank: dict[int, dict]) -> Iterator[Finding]:
    """Versions, devices and placement of all ranks against each other."""
    first, hosts = by_rank[min(by_rank)], hosts_of(by_rank)
    differing: dict[str, list[int]] = {}
    for rank, said in by_rank.items():
        for name in first["versions"].keys() | said["versions"].keys():
            here, there = first["versions"].get(name, "missing"), said["versions"].get(name, "missing")
            if here != there:
                differing.setdefault(f"{name} is {there}, on rank {min(by_rank)} {here}", []).append(rank)
    for text, ranks in sorted(differing.items()):
        yield error("ranks", f"{text} [rank {spans(ranks)}]", "the same checkout and `pip install -r requirements.lock` on all nodes")
    if len(devices := {said["device"] for said in by_rank.values()}) > 1:
        yield error("ranks", f"ranks are on {' and '.join(sorted(devices))}", "unset DS_ACCELERATOR, and look at the accelerator of each node above")
    if not differing:
        yield ok("ranks", f"{len(by_rank)} ranks answer, with the same versions and the same toolkit")

    said = ", ".join(f"{host}: {spans(ranks)}" for host, ranks in hosts.items())
    gpus: dict[tuple, list[int]] = {}
    for rank, one in by_rank.items():
        if one["gpu"]:
            gpus.setdefault((one["host"], one["gpu"]), []).append(rank)
    doubled = [(host, ranks) for (host, _), ranks in gpus.items() if len(ranks) > 1]
    for host, ranks in doubled:
        yield error("placement", f"ranks {spans(ranks)} have the same GPU of {host}", "one rank a GPU: deepspeed --num_gpus, srun --gpus-per-task=1")
    if len({len(ranks) for ranks in hosts.values()}) > 1:
        yield warning("placement", f"{said}: nodes have different numbers of ranks", "the same slots a node: --num_gpus, --ntasks-per-node or the hostfile")
    elif not doubled:
        yield ok("placement", f"{len(by_rank)} ranks on {len(hosts)} node{'s' * (len(hosts) > 1)}, {said}")


def hosts_of(by_rank: dict[int, dict]) -> dict[str, list[int]]:
    """host -> its ranks, in the order of their first ranks."""
    hosts: dict[str, list[int]] = {}
    for rank, said in sorted(by_rank.items()):
        hosts.setdefault(said["host"], []).append(rank)
    return hosts


def measure(store: dist.TCPStore, rank: int, world: int, timeout: float, hosts: dict[str, list[int]], folder: Path | None) -> dict:
    """What only all ranks together can tell: {"findings", "measured", "not_checked"} on rank 0, {} on the others.

    It runs in a thread of its own, and the ranks say what they are at: those that stand still when the time is over are named.
    """
    found, at, done = {}, ["joining"], threading.Event()
    own, other = store.clone(), store.clone()  # a connection each: one that waits for a key does nothing else

    def work() -> None:
        try:
            found.update(_measured(own, rank, world, timeout, hosts, folder, at))
        except Exception as problem:  # gloo and NCCL raise RuntimeErrors of many kinds when a rank is gone
            found["problem"] = first_line(problem)

    def beat() -> None:
        number = 0
        while not done.wait(BEAT):
            number += 1
            tell(other, f"beat/{rank}", [at[0], number])

    thread = threading.Thread(target=work, daemon=True)
    for each in (thread, threading.Thread(target=beat, daemon=True)):
        each.start()
    thread.join(timeout)
    whole = not thread.is_alive() and "problem" not in found
    if rank or whole:
        if whole:
            done.set()  # else rank 0 still looks whether this one lives
        return found if whole else {}
    before = _beats(store, world)
    time.sleep(6 * BEAT)
    after = _beats(store, world)
    done.set()
    still = [r for r in range(1, world) if after[r] == before[r] and after[r][0] != DONE]
    if still:
        where = ", ".join(host for host, ranks in hosts.items() if set(ranks) & set(still))
        who, mend = f"rank {spans(still)} ({where}) stands still or is dead", "look at it there: py-spy dump, dmesg, nvidia-smi"
    else:
        places = sorted({place for place, _ in after.values()})
        who = "all ranks live, at " + "; ".join(f"{place}: rank {spans([r for r in after if after[r][0] == place])}" for place in places)
        mend = "NCCL_DEBUG=INFO says what it waits for; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network (ip -br addr)"
    reason = found.get("problem") or f"nothing came back in {timeout:g} s"
    text = f"the ranks did not come through ({at[0]}): {reason}; {who}"
    return {"findings": [error("all-reduce", text, mend)], "measured": {}, "not_checked": {"clocks, pairs": "the ranks did not come through"}}


def _beats(store: dist.TCPStore, world: int) -> dict[int, list]:
    """rank -> [what it is at, number of its last beat]."""
    return {rank: told(store, f"beat/{rank}") if store.check([f"doctor/beat/{rank}"]) else ["joining", 0] for rank in range(world)}


def _measured(store: dist.TCPStore, rank: int, world: int, timeout: float, hosts: dict[str, list[int]], folder: Path | None, at: list[str]) -> dict:
    backend = "gloo" if get_accelerator().device_name() == "cpu" else get_accelerator().communication_backend_name()
    dist.init_process_group(backend, store=dist.PrefixStore("doctor/group", store), rank=rank, world_size=world, timeout=timedelta(seconds=timeout + 60))
    ranks = start()
    findings, leaders = [], [members[0] for members in hosts.values()]
    if folder and len(leaders) > 1:
        at[0] = "shared folder"
        findings += _shared_folder(store, ranks, leaders, hosts, folder)
    at[0] = "clocks"
    ahead = clocks(ranks, leaders[1:] or [1])
    at[0] = "all-reduce"
    reduced = all_reduce(ranks)
    at[0] = "pairs"
    tell(store, f"pairs/{rank}", pairs(ranks, timeout / 4))
    at[0] = DONE
    if rank:
        return {}
    silent(store, "pairs", world, timeout)
    linked = [pair for other in range(world) for pair in told(store, f"pairs/{other}")]
    findings += [*said_of_clocks(ahead, hosts), *said_of_all_reduce(reduced, backend), *said_of_pairs(linked, hosts)]
    return {"findings": findings, "measured": {"clocks": ahead, "all_reduce": reduced, "pairs": linked}, "not_checked": {}}


def _shared_folder(store: dist.TCPStore, ranks: Ranks, leaders: list[int], hosts: dict, folder: Path) -> list[Finding]:
    """Rank 0 holds a locked file in the folder, the first rank of each other node looks for it."""
    if ranks.main:
        with hold(folder) as name:
            tell(store, "folder", name)
            seen = {other: told(store, f"folder/{other}") for other in leaders[1:]}
        return list(said_of_folder(folder, {host: seen[members[0]] for host, members in hosts.items() if members[0] in seen}))
    if ranks.rank in leaders:
        tell(store, f"folder/{ranks.rank}", look(folder / told(store, "folder")))
    return []


def said_of_clocks(measured: list[dict], hosts: dict[str, list[int]]) -> Iterator[Finding]:
    """Clocks against rank 0's."""
    worst = max(measured, key=lambda one: abs(one["ahead_s"]))
    host = next(name for name, ranks in hosts.items() if worst["rank"] in ranks)
    said = f"the clock of rank {worst['rank']} ({host}) is {1e3 * worst['ahead_s']:+.3f} ms from rank 0's, known to {1e3 * worst['within_s']:.3f} ms"
    mend = "timedatectl set-ntp true, or start chrony on all nodes"
    if abs(worst["ahead_s"]) > REFUSED:
        yield error("clocks", f"{said}: munge refuses credentials over {REFUSED:.0f} s", mend)
    elif abs(worst["ahead_s"]) > SKEW:
        yield warning("clocks", f"{said}: heartbeats and logs of the nodes do not compare", mend)
    else:
        yield ok("clocks", f"{said}, the farthest of {len(measured) + 1}")


def said_of_all_reduce(rows: list[dict], backend: str) -> Iterator[Finding]:
    sizes = ", ".join(f"{row['bytes'] / 1e6:,.3g} MB {row['bus_gb_s']:.3g}" for row in rows)
    wrong = [row for row in rows if not row["right"]]
    if wrong:
        yield error(
            "all-reduce", f"{backend}: sums of {len(wrong)} of {len(rows)} sizes are wrong, of {wrong[0]['bytes']:,} bytes first",
            "NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 tells which way is bad; take that node out (--exclude)",
        )  # fmt: skip
    else:
        yield ok("all-reduce", f"{backend}, bus bandwidth in GB/s: {sizes}; all sums are right")

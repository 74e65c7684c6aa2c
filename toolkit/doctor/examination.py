"""All checks in their order: of this process, of its node, and with the other ranks. Rank 0 has the report."""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from huggingface_hub.constants import HF_HUB_CACHE

from toolkit.doctor import disk, files, machine, ranks, software
from toolkit.doctor.finding import ERROR, Finding, checked, error, report_of
from toolkit.errors import UserError, first_line
from toolkit.spans import spans
from toolkit.training.distributed import take_place


def examine(args: argparse.Namespace, show: Callable[[dict], None]) -> bool:
    """Whether an error was found. Rank 0 shows the report (for its form see `report_of`); the others wait for it, and end the process.

    Raises UserError where the variables of a rank are there in part.
    """
    take_place()
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world > 1 and (missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]):
        mend = "start it by deepspeed --module toolkit.doctor or srun, or unset RANK and WORLD_SIZE to look at this machine alone"
        raise UserError(f"WORLD_SIZE is {world} and {' and '.join(missing)} not set; {mend}")
    local_world = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", world)))
    findings = checked("versions", software.check_versions) + checked("accelerator", machine.check_accelerator, local)
    if local == 0:
        findings += of_node(args, rank, world, local_world)
    skipped = {name: f"no {flag}" for name, flag, given in _asked(args) if not given}
    if world == 1:
        skipped["clocks, all-reduce, pairs"] = "one rank; deepspeed --num_gpus 2 --module toolkit.doctor, or srun, looks at them"
        report = report_of({0: findings}, {os.uname().nodename: [0]}, skipped, {})
        show(report)
    else:
        report = together(args, show, rank, world, local, findings, skipped)
    return report["status"] == ERROR


def _asked(args: argparse.Namespace) -> list[tuple]:
    return [
        ("shards and whose tokens they hold", "--shards", args.shards), ("whether tokenizer T made them", "--tokenizer", args.tokenizer),
        ("model", "--model", args.model),
        ("ds_config", "--deepspeed", args.deepspeed), ("run folder and its disk", "--output_dir", args.output_dir),
    ]  # fmt: skip


def of_node(args: argparse.Namespace, rank: int, world: int, local_world: int) -> list[Finding]:
    """What is the same for all ranks of a node, looked at by the first of them."""
    gpu = get_accelerator().device_name() != "cpu"
    temporary = tempfile.gettempdir()
    looks = [
        ("processor", machine.check_processor, local_world, world > 1), ("memory", machine.check_memory), ("compiled ops", software.check_ops),
        ("compiler", software.check_compiler, gpu), ("caches", software.check_caches), ("ports", machine.check_ports, rank, world),
        ("names", machine.check_names, world > local_world), ("shared memory", machine.check_shared_memory, gpu),
        ("open files", machine.check_open_files, world), ("locked memory", machine.check_locked_memory), ("processes", machine.check_processes),
        ("disk", disk.check_disk, "HF cache", HF_HUB_CACHE, "HF_HOME"), ("disk", disk.check_disk, "temporary files", temporary, "TMPDIR"),
    ]  # fmt: skip
    if args.output_dir:
        looks += [("disk", disk.check_disk, "--output_dir", args.output_dir, "--output_dir"), ("run folder", files.check_run_folder, args.output_dir)]
    if args.shards:
        looks += [("shards", files.check_shards, args.shards)]
    if args.shards or args.tokenizer:
        looks += [("tokenizer", files.check_tokenizer, args.shards, args.tokenizer)]
    if args.model:
        looks += [("model", files.check_model, args.model, args.shards, args.tokenizer)]
    if args.deepspeed:
        looks += [("ds_config", files.check_ds_config, args.deepspeed, world)]
    return [finding for look in looks for finding in checked(*look)]


def together(
    args: argparse.Namespace, show: Callable[[dict], None], rank: int, world: int, local: int, findings: list[Finding], skipped: dict[str, str]
) -> dict:
    """The findings of all ranks, and of what is between them, shown and returned. Whoever does not answer is named."""
    here, why_not = {os.uname().nodename: [rank]}, {"clocks, all-reduce, pairs": "the ranks did not all answer"}
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if rank == 0 and any(finding.check in ("ports", "names") and finding.status == ERROR for finding in findings):
        report = report_of({0: findings}, here, skipped | why_not, {}, world)
        show(report)
        return report
    try:
        store = ranks.open_store(rank, world, args.timeout)
        ranks.tell(store, f"local/{rank}", {"facts": ranks.facts(local, software.versions()), "findings": [asdict(finding) for finding in findings]})
        if rank:
            _follow(store, rank, world, args)
    except RuntimeError as problem:
        if rank:
            print(f"error: rank {rank} on {os.uname().nodename}: rank 0 at {address} is gone or does not answer ({first_line(problem)})", file=sys.stderr)
            os._exit(1)
        failed = error("ranks", f"rank 0 cannot open its store at {address} ({first_line(problem)})", "--master_addr must be an address of rank 0's node")
        report = report_of({0: [*findings, failed]}, here, skipped | why_not, {}, world)
        show(report)
        return report
    missing = ranks.silent(store, "local", world, args.timeout)
    said = {other: ranks.told(store, f"local/{other}") for other in range(world) if other not in missing}
    facts, by_rank = {other: one["facts"] for other, one in said.items()}, {other: [Finding(**f) for f in one["findings"]] for other, one in said.items()}
    hosts, measured, between = ranks.hosts_of(facts), {}, []
    ranks.tell(store, "go", {"measure": not missing, "hosts": hosts})
    if missing:
        there = ", ".join(f"{host}: {spans(members)}" for host, members in hosts.items())
        text = f"rank {spans(missing)} of {world} did not answer at {address} within {args.timeout:g} s; there are {there}"
        mend = "look at their nodes: do they run, reach MASTER_ADDR, and let its port through a firewall? A slow start needs more --timeout"
        between, skipped = [error("ranks", text, mend)], skipped | why_not
    else:
        result = ranks.measure(store, rank, world, args.timeout, hosts, _folder(args))
        between = [*checked("ranks", ranks.compare, facts), *result["findings"]]
        measured, skipped = result["measured"], skipped | result["not_checked"]
    by_rank = {other: found + between for other, found in by_rank.items()}
    report = report_of(by_rank, hosts, skipped, measured, world)
    show(report)  # before any rank ends: srun --kill-on-bad-exit and the deepspeed launcher then end all others
    ranks.tell(store, "code", int(report["status"] == ERROR))
    ranks.tell(store, "read/0", True)
    ranks.silent(store, "read", world, 0 if missing else 5)
    return report


def _follow(store, rank: int, world: int, args: argparse.Namespace) -> None:
    """What the ranks beside rank 0 do. Does not return: they end with its exit code."""
    go = ranks.told(store, "go", 2 * args.timeout)
    if go["measure"]:
        ranks.measure(store, rank, world, args.timeout, go["hosts"], _folder(args))
    code = ranks.told(store, "code", args.timeout + 60)
    ranks.tell(store, f"read/{rank}", True)
    os._exit(code)  # not sys.exit: a thread may be in a collective that never ends


def _folder(args: argparse.Namespace) -> Path | None:
    return disk.existing(args.output_dir) if args.output_dir else None

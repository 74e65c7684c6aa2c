"""Which rank holds the others up, from the heartbeats of all."""

from pathlib import Path

from toolkit.spans import spans
from toolkit.training.heartbeat import process_state


def verdict(beats: dict[int, dict | None], still: set[int], timeout: float, stacks: Path) -> str:
    """What the watchdog prints.

    beats: the newest heartbeat of each rank (None: there is none). still: the ranks whose heartbeats stand still; processes of this host are looked at.
    """
    named, why = suspects(beats, still)
    others = [rank for rank in beats if rank not in named]
    lines = [f"HANG: for {timeout:g} s (--hang_timeout) no rank has made progress; {why}"]
    for rank in named[:8]:
        lines.append(f"  rank {rank}{_where(beats[rank], rank in still)}")
    if len(named) > 8:
        lines.append(f"  and ranks {spans(named[8:])}")
    doing: dict[str, list[int]] = {}
    for rank in others:
        doing.setdefault(_doing(beats[rank]), []).append(rank)
    for what, group in sorted(doing.items(), key=lambda item: item[1])[:8]:
        lines.append(f"  {'rank' if len(group) == 1 else 'ranks'} {spans(group)}: {what}")
    without = sorted(still)
    missing = f"; none of {'rank' if len(without) == 1 else 'ranks'} {spans(without)}, which did not answer" if without else ""
    lines.append(f"  stacks of all threads: {stacks}/rank-N.txt{missing}")
    saved = "its newest checkpoint is as it was, and the same command goes on from there"
    saved = saved if (stacks.parent / "latest").is_file() else "no checkpoint was written yet, the same command begins anew"
    lines.append(f"The run ends with exit code 86; {saved}. Where it was only slow: a larger --hang_timeout.")
    return "\n".join(lines)


def suspects(beats: dict[int, dict | None], still: set[int]) -> tuple[list[int], str]:
    """The ranks that hold the others up, and why it is thought so. The most certain reason first."""
    failed = [rank for rank, beat in beats.items() if beat and beat["phase"].startswith("failed")]
    if failed:
        return _blame(failed, "ended with an error")
    if standing := [rank for rank, beat in beats.items() if rank in still or not beat]:
        return _blame(standing, "is dead, stopped or stuck outside of Python")
    if len(beats) == 1:
        return list(beats), f"rank {next(iter(beats))} is the only one"
    last = {rank: beat["collective"] or {"name": "none", "number": 0, "bytes": 0, "inside": False} for rank, beat in beats.items()}
    newest = max(one["number"] for one in last.values())
    behind = [rank for rank, one in last.items() if one["number"] < newest]
    if behind:
        name = next(one["name"] for one in last.values() if one["number"] == newest)
        return _blame(behind, f"has not come to collective {newest} ({name}), where the others are")
    outside = [rank for rank, one in last.items() if not one["inside"]]
    if outside and len(outside) < len(last):
        return _blame(outside, f"is not inside of collective {newest}, in which the others wait")
    kinds = {(one["name"], one["bytes"]) for one in last.values()}
    if len(kinds) > 1:
        return [], "the ranks are in different collectives, or give them tensors of different sizes"
    return [], f"all ranks have come to collective {newest}, which does not end: the network between them, or a device, is to be looked at"


def _blame(ranks: list[int], what: str) -> tuple[list[int], str]:
    one = len(ranks) == 1
    return ranks, f"{'rank' if one else 'ranks'} {spans(ranks)} {'holds' if one else 'hold'} the others up: {'it' if one else 'each'} {what}"


def _why_still(beat: dict) -> str:
    state = process_state(beat)
    if state is None:
        return f"its heartbeat stands still: the process, or {beat['host']}, is dead or stopped"
    if state == "gone":
        return "its process is gone"
    if state == "T":
        return "its process is stopped (state T: SIGSTOP or a suspended terminal)"
    return f"its process lives (state {state}), its heartbeat stands still: it is stuck in native code"


def _where(beat: dict | None, still: bool) -> str:
    if beat is None:
        return ": there is no heartbeat of it (do all nodes share the run folder?)"
    why = f"{_why_still(beat)}; last heard of in " if still and not beat["phase"].startswith("failed") else ""
    return f" on {beat['host']} (pid {beat['pid']}): {why}{_doing(beat)}, at {beat['at']}"


def _doing(beat: dict | None) -> str:
    if not beat:
        return "no heartbeat"
    phase, last = f"step {beat['step']}, {beat['phase']}", beat["collective"]
    if not last:
        return f"{phase}, no collective yet"
    what = f"collective {last['number']}, {last['name']}" + (f" of {last['bytes']:,} bytes" if last["bytes"] else "")
    return f"{phase}, {'waits in' if last['inside'] else 'last'} {what}"

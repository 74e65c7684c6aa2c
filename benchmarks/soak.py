"""A week's run in small: a run of pretraining under faults must end as the same run does undisturbed, bit for bit.

    python benchmarks/soak.py --out runs/soak --minutes 30        # what `make soak` runs; the undisturbed run comes first
    python benchmarks/soak.py --out runs/soak --minutes 2         # a look: 4.3 minutes on two cores

`tiny` is pretrained on synthetic ECGs by two gloo ranks, first undisturbed, then under faults (benchmarks/faults.py), started again by the same command
until it is complete, as a batch system would; and again from the beginning until --minutes are over. Nothing may be lost: every step once and with the same
loss, the same weights, samples counted once, no process and no file left over. Exit code 0 if all of it held; soak.json says what struck when.

It runs in name spaces of its own (`unshare`), so that its disk of 1 GB, which faults fill up, and whatever it starts vanish with it; where the system
forbids that, no disk is filled. --out is begun anew each time.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.faults import FAULTS, deck
from benchmarks.soak_checks import differences, losses
from benchmarks.soak_runs import Scene, disturbed, stop_all, undisturbed
from benchmarks.turns import RANKS, run_module, synthetic_ecgs
from toolkit.errors import UserError, exit_2_on_user_error

INSIDE = "HEARTSPEED_SOAK_INSIDE"  # set where the name spaces are those of this soak
DISK = "1g"  # two checkpoints of the 5 M parameters of `tiny`, one being written, the model
RECORDS, SHARD_SIZE = 200, 40
STEPS_PER_MINUTE, FEWEST, MOST = 20, 30, 600  # of --minutes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, their logs and soak.json")
    parser.add_argument("--minutes", type=float, default=30, help="how long faults strike; the run that is under way is then left to come to its end (30)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (0)")
    args = parser.parse_args()
    if not args.minutes > 0:
        raise UserError(f"--minutes must be above 0, not {args.minutes}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))  # through every `finally`
    if INSIDE not in os.environ and (command := name_spaces()):
        begin(args.out)
        sys.exit(inside(command))
    if INSIDE not in os.environ:
        begin(args.out)
    soak(args.out.absolute(), args.minutes, args.seed)


def begin(out: Path) -> None:
    """An empty folder, in place of a former soak's. Raises UserError if it holds anything else."""
    if out.exists() and any(out.iterdir()) and not (out / "soak.json").is_file():
        raise UserError(f"--out {out} holds something that is no soak's; name another folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "soak.json").write_text("{}")


def name_spaces() -> list[str] | None:
    """What opens name spaces for a command that die with this process, whatever it dies of; None where that is not allowed."""
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if not all(map(shutil.which, ("setpriv", "unshare"))) or subprocess.run([*command, "true"], stderr=subprocess.DEVNULL).returncode:
        return None
    return command


def inside(command: list[str]) -> int:
    """Run this same command there; its exit code."""
    process = subprocess.Popen([*command, sys.executable, *sys.argv], env={**os.environ, INSIDE: "1"}, start_new_session=True)
    try:
        return process.wait()
    finally:
        process.kill()  # and with it all that it started
        process.wait()


def soak(out: Path, minutes: float, seed: int) -> None:
    """Both runs, their comparison, the table; exits with 1 if anything was lost."""
    value = f"{os.getpid()}-{time.time_ns()}"
    try:
        steps = round(min(MOST, max(FEWEST, STEPS_PER_MINUTE * minutes)))
        scene = Scene(out, make_shards(out / "corpus"), own_disk(out / "disk"), steps, value)
        pace, folders = runs(scene, minutes, seed)
    finally:
        stop_all(value)
    result = {"minutes": minutes, "seed": seed, "steps": scene.steps, "runs": folders, "launches": scene.launches, "pace": pace,
              "faults": [{name: value for name, value in event.items() if name != "clock"} for event in scene.struck], "problems": scene.problems}  # fmt: skip
    (out / "soak.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    print("\n".join(f"FAILED: {problem}" for problem in scene.problems) or f"nothing was lost: final loss {losses(out / 'undisturbed')[-1][1]} in all runs")
    sys.exit(bool(scene.problems))


def own_disk(path: Path) -> Path | None:
    """A small disk at `path`, which only this soak sees and which vanishes with its name spaces; None where there are none to mount it in."""
    path.mkdir()
    if INSIDE not in os.environ or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(path)]).returncode:
        return None
    return path


def make_shards(work: Path) -> Path:
    """Token shards of synthetic ECGs by an untrained tokenizer, several of them in train."""
    from toolkit.tokenizer.tokenizer import ECGTokenizer, TokenizerConfig

    ptbxl = synthetic_ecgs(work, RECORDS)
    ECGTokenizer(TokenizerConfig()).save_pretrained(work / "tokenizer")
    run_module("sharding.prepare", "ptbxl", "--root", ptbxl, "--out", work / "manifest")
    run_module("sharding.shard", "--manifest", work / "manifest", "--tokenizer", work / "tokenizer", "--out", work / "shards", "--shard_size", SHARD_SIZE)
    return work / "shards"


def runs(scene: Scene, minutes: float, seed: int) -> tuple[dict, int]:
    """The undisturbed run, then runs under faults until the minutes are over; (seconds of the undisturbed run, number of the others)."""
    scene.say(f"undisturbed: {scene.steps} steps on {RANKS} ranks")
    pace = undisturbed(scene)
    scene.say(f"undisturbed: first step after {pace.start:.1f} s, then {pace.step:.2f} s a step, {pace.validation:.1f} s a validation")
    faults = deck(seed, [kind for kind in FAULTS if scene.disk or kind != "full disk"])
    if not scene.disk:
        scene.say("full disk: skipped, this system does not let us mount a disk of our own")
    until, number = time.monotonic() + 60 * minutes, 0
    while number == 0 or until - time.monotonic() > 15 * minutes:  # another run that a quarter of the faults will strike
        number += 1
        folder = (scene.disk or scene.out / "disk") / f"run-{number}"
        disturbed(scene, folder, pace, faults, until)
        found = differences(scene.out / "undisturbed", folder, scene.steps)
        for problem in found:
            scene.problem(f"run {number}: {problem}")
        scene.say(f"run {number} is complete after {len(scene.struck)} faults in all: " + ("it differs" if found else "the same as undisturbed, bit for bit"))
        shutil.copytree(folder, scene.out / folder.name, ignore=shutil.ignore_patterns("checkpoint-*", "model.safetensors"))
        shutil.rmtree(folder)
    return vars(pace), number


def table(result: dict) -> str:
    """A line for each kind of fault: how often it struck, exit codes, medians and the longest of seconds."""
    lines = [f"{'fault':<12}{'count':>6}  {'exit codes':<24}{'ended after (s)':>18}{'further after (s)':>20}"]
    for kind in FAULTS:
        events = [event for event in result["faults"] if event["kind"] == kind]
        codes = sorted({"goes on" if event["code"] is None else str(event["code"]) for event in events})
        seconds = [[event[name] for event in events if event.get(name) is not None] for name in ("ended_after", "further_after")]
        spread = [f"{statistics.median(each):.0f} ({max(each):.0f})" if each else "-" for each in seconds]
        lines.append(f"{kind:<12}{len(events):>6}  {', '.join(codes) or '-':<24}{spread[0]:>18}{spread[1]:>20}")
    moments = {moment: sum(event["moment"] == moment for event in result["faults"]) for moment in ("start", "training", "saving", "validation", "end")}
    lines.append(f"{len(result['faults'])} faults: " + ", ".join(f"{n} in {moment}" for moment, n in moments.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    exit_2_on_user_error(main)()

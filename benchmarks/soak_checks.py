"""What benchmarks/soak.py compares of two run folders."""

import json
import re
from collections import Counter
from pathlib import Path

from toolkit.training.events import read_records

LIMITED = 2  # --save_total_limit
SAME = ("loss", "eval_loss", "grad_norm", "learning_rate")  # scalars that do not speak of time


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every line of log.jsonl that has a loss, in the order of the lines."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def scalars(folder: Path) -> dict[str, list[tuple[int, float, float]]]:
    """TensorBoard's scalars and texts: tag -> [(step, value, time)] in the order in which they are read; a text's or an image's value is 0."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for path in sorted((folder / "tensorboard").glob("events.out.tfevents.*")):
        for _, event in read_records(path):
            for value in event.summary.value:
                tensor = value.tensor.float_val[0] if value.tensor.float_val else value.simple_value
                found.setdefault(value.tag, []).append((event.step, tensor, event.wall_time))
    return found


def wall_times(folder: Path) -> dict[int, float]:
    """step -> when its loss was logged, in seconds since the epoch."""
    return {step: time for step, _, time in scalars(folder)["loss"]}


def differences(one: Path, other: Path, steps: int) -> list[str]:
    """What `other`, the run under faults, has that `one`, the undisturbed, has not; empty if nothing was lost, doubled or left over."""
    found, (a, b) = [], (losses(one), losses(other))
    if [step for step, _ in b] != list(range(1, steps + 1)):
        twice = sorted(step for step, n in Counter(step for step, _ in b).items() if n > 1)
        missing = sorted(set(range(1, steps + 1)) - {step for step, _ in b})
        found.append(f"log.jsonl does not hold every step once, in order: twice {twice[:9]}, missing {missing[:9]}")
    changed = [step for (step, loss), (_, another) in zip(sorted(a), sorted(b)) if loss != another]
    if changed:
        found.append(f"{len(changed)} losses are not those of the undisturbed run, the first one at step {changed[0]}")
    if (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes():
        found.append("model.safetensors is not that of the undisturbed run")
    counts = [{name: json.loads((folder / "train_results.json").read_text())[name] for name in ("steps", "samples", "skipped")} for folder in (one, other)]
    if counts[0] != counts[1]:
        found.append(f"train_results.json counts {counts[1]}, not {counts[0]}")
    return found + _events(scalars(one), scalars(other)) + _left_over(one, other)


def _events(a: dict, b: dict) -> list[str]:
    found = []
    for tag, points in b.items():
        twice = sorted(step for step, n in Counter(step for step, *_ in points).items() if n > 1)
        if twice:
            found.append(f"TensorBoard has {tag} twice at steps {twice[:9]}")
    for tag in SAME:
        if [point[:2] for point in a.get(tag, ())] != [point[:2] for point in b.get(tag, ())]:
            found.append(f"TensorBoard's {tag} is not that of the undisturbed run")
    return found + [f"TensorBoard's {tag} is missing" for tag in sorted(a.keys() - b.keys())]


def _left_over(one: Path, other: Path) -> list[str]:
    """By names: the number of a checkpoint and of an event file is its own; hang/ is what the watchdog tells of its hangs."""

    def names(folder: Path) -> set[str]:
        paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
        own = (re.sub(r"^checkpoint-\d+", "checkpoint", re.sub(r"tfevents\..*", "tfevents", name)) for name in paths)
        return {name for name in own if name.split("/")[0] != "hang"}

    a, b, checkpoints = names(one), names(other), len(list(other.glob("checkpoint-*")))
    found = [f"{name} is left over" for name in sorted(b - a)] + [f"{name} is missing" for name in sorted(a - b)]
    return found + ([f"{checkpoints} checkpoints are kept, not {LIMITED}"] if checkpoints != LIMITED else [])

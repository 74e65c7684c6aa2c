"""`--profile 10:15`: a trace of these steps on rank 0, to look at in chrome://tracing or ui.perfetto.dev."""

import re
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from toolkit.errors import UserError


def steps_of(spec: str) -> range:
    """The steps that --profile FROM:TO names, counted from 0 and without TO. Raises UserError for what is no such range."""
    found = re.fullmatch(r"(\d+):(\d+)", spec)
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(f"--profile: {spec!r} is not FROM:TO, two step numbers from 0 on with FROM below TO; for example 10:15 traces the steps 10 to 14")
    return range(int(found[1]), int(found[2]))


class Profiler:
    """Call `step(n)` before each step n, and `close()` after the last one; writes profile/trace-rank0.json. spec None: does nothing."""

    def __init__(self, spec: str | None, folder: Path):
        self.steps, self.path = steps_of(spec) if spec else range(0), folder / "profile" / "trace-rank0.json"
        self.trace = self.mark = None

    def step(self, n: int) -> None:
        if self.mark:
            self.mark.__exit__(None, None, None)
            self.mark = None
        if n in self.steps:
            if not self.trace:
                cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
                self.trace = profile(activities=[ProfilerActivity.CPU, *cuda])
                self.trace.start()
            self.mark = record_function(f"step {n}")
            self.mark.__enter__()
        elif self.trace:
            self._write()

    def close(self) -> None:
        """Write the trace if the run ended within its steps. Raises UserError if it cannot be written."""
        if self.trace:
            self.step(self.steps.stop)

    def _write(self) -> None:
        self.trace.stop()
        try:
            self.path.parent.mkdir(exist_ok=True)
            self.trace.export_chrome_trace(str(self.path))
        except (OSError, RuntimeError) as error:  # the exporter's own for a file it cannot write
            raise UserError(f"--output_dir: cannot write {self.path} ({error})") from error
        self.trace = None

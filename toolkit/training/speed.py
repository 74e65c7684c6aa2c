"""How fast a run is: sums over the steps between two log lines."""

import math
import resource
import statistics

import torch


class Interval:
    """Begin one after each log line. Only time inside of steps counts: validation and checkpoints between them do not.

    peak: FLOP/s that the processor of one rank can do at most.
    """

    def __init__(self, device: torch.device, world: int, peak: float):
        self.device, self.world, self.peak = device, world, peak
        self.seconds: list[float] = []
        self.summed = self.targets = self.waited = self.tokens = self.ecgs = self.flops = self.collective = self.compute = 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def add(
        self, loss: float, targets: float, tokens: float, ecgs: float, flops: float, seconds: float, waited: float, collective: float, forward: float | None
    ) -> None:
        """A step: mean loss, counts and FLOPs of all ranks together (flops 0: not known); seconds of this rank, how many of them it waited for data and
        was in collectives, and how many a GPU took for the forward passes (None: there is none)."""
        if math.isfinite(loss):
            self.summed += loss * targets
            self.targets += targets
        self.seconds.append(seconds)
        self.waited += waited
        self.collective += collective
        self.compute += seconds - waited - collective if forward is None else forward
        self.tokens += tokens
        self.ecgs += ecgs
        self.flops += flops

    def own(self) -> list[float]:
        """This rank's part, in the order of `stragglers.NAMES`: means over the steps, and the peak of memory."""
        steps = len(self.seconds)
        parts = (sum(self.seconds), self.compute, self.waited, self.collective)
        return [*(part / steps for part in parts), peak_memory(self.device) / 1e9]

    def values(self, steps_left: int, grad_norm: float | None, learning_rate: float, skew: float | None) -> dict[str, float | None]:
        """The numbers of a log line in their order. skew: of `stragglers`, left out if it is None.

        loss: mean over the targets of the steps whose loss is finite, None if there is none. tflops and mfu: of one rank, left out if FLOPs are not known.
        memory_gb: the peak of this interval on a GPU; on a CPU that of the process so far. seconds_left: from the median step.
        """
        total, step = sum(self.seconds), statistics.median(self.seconds)
        flops = self.flops / self.world / total
        return {
            "loss": self.summed / self.targets if self.targets else None,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "memory_gb": peak_memory(self.device) / 1e9,
            "ecgs_per_second": self.ecgs / total,
            "tokens_per_second": self.tokens / total,
            **({"tflops": flops / 1e12, "mfu": flops / self.peak} if flops else {}),
            "data_wait": self.waited / total,
            **({"skew": skew} if skew is not None else {}),
            "seconds_left": step * steps_left,
            "step_seconds": step,
        }


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU since its statistics were reset, or this process on a CPU since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB

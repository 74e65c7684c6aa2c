"""Micro-batches of pretraining: ECGs to forecast.

A micro-batch is one padding-free row, in which attention never crosses ECGs. Its size is counted in rows of `--seq_len` tokens: each stands
for the same number of whole ECGs, `samples_per_row`, so that the place in the data stays arithmetic.
"""

import numpy as np

from toolkit.errors import UserError
from toolkit.shards.order import MicroBatch, sample_at
from toolkit.shards.packing import Group, Sequence, pack
from toolkit.shards.reader import Shards
from toolkit.tasks.prompts import Prompts, branch, ecg_ids, forecast_group, prompt_ids
from toolkit.tasks.vocabulary import ECGVocabulary
from toolkit.tasks.windows import LEAST, window_groups, window_starts

MEASURED = 1000  # reports, evenly spaced, whose longest decides the room of all; 0.2 s to tokenise 1,000 of the demo


def ecgs_per_row(tokens: int, seq_len: int) -> int:
    """How many ECGs of `tokens` tokens each fit a row of `seq_len`. Raises UserError naming --seq_len if not one does."""
    if tokens > seq_len:
        raise UserError(f"--seq_len {seq_len} is too short for one ECG with all that is predicted of it; use at least {tokens}")
    return seq_len // tokens


class ForecastData:
    """Pretraining: every ECG token is a target, with objective `windows` the release's steps alone; and with `reports` the report after the ECG.

    seq_len: tokens of a row; `samples_per_row` ECGs are sure to fit it (one, without seq_len). A report is cut to what is the longest of
    `MEASURED`; `cut_reports` counts those. seed: of the windows' places. Raises UserError naming --seq_len or --objective.
    """

    def __init__(
        self, shards: Shards, tokenizer, vocabulary: ECGVocabulary, reports: bool = False, objective: str = "causal", seq_len: int | None = None, seed: int = 0
    ):
        self.shards, self.tokenizer, self.vocabulary, self.reports = shards, tokenizer, vocabulary, reports
        self.windows, self.seed = objective == "windows", seed
        self.report_room, self.cut_reports, self.samples_per_row = None, 0, 1
        lengths = shards.rows["n_tokens"]
        if self.windows and lengths.min() < LEAST:
            raise UserError(f"--objective windows: the shards hold an ECG of {lengths.min()} tokens, the smallest window needs {LEAST}; use causal")
        if seq_len is not None:
            self.samples_per_row = ecgs_per_row(self._room(int(lengths.argmax())), seq_len)

    def __len__(self) -> int:
        return len(self.shards)

    def at(self, seed: int, position: int) -> tuple[int, int]:
        return sample_at(seed, len(self), position)

    def key(self, index: int) -> str:
        return self.shards.key(index)

    def batch(self, samples: list[tuple[int, int]]) -> MicroBatch:
        return micro_batch([group for epoch, i in samples for group in self._groups(epoch, i)], len(samples))

    def _groups(self, epoch: int, i: int) -> list[Group]:
        codes, gain_tokens = self.shards.ids(i), self.vocabulary.gain_first is not None
        meta = self.shards.meta(i) if self.reports or gain_tokens else {}
        gains = meta["gains"] if gain_tokens else None
        if not self.windows:
            return [forecast_group(self.tokenizer, self.vocabulary, codes, gains, self._report(meta))]
        ids = ecg_ids(self.tokenizer, self.vocabulary, codes, gains)
        opening, tokens, _ = np.split(ids, [-1 - codes.size, -1])
        groups, report = window_groups(opening, tokens, window_starts(codes.size, self.seed, epoch, i)), self._report(meta)
        return [*groups, Group(Sequence(ids, np.zeros(len(ids), bool)), report)] if report else groups

    def _report(self, meta: dict) -> list[Sequence]:
        if not (self.reports and meta["report"]):
            return []
        task, said = {"task": "report", "report": meta["report"]}, Prompts()
        report = branch(self.tokenizer, said, task, prompt_ids(self.tokenizer, self.vocabulary, said, self.shards.ids(0), meta, task))
        if self.report_room is not None and len(report.ids) > self.report_room:
            report = Sequence(report.ids[: self.report_room], report.target[: self.report_room])
            self.cut_reports += 1
        return [report] if report.target.any() else []

    def _room(self, longest: int) -> int:
        """Tokens that no ECG exceeds; `longest` is the index of one with the most ECG tokens. The same on all ranks."""
        windows = sum(len(group.prefix.ids) for group in self._groups(0, longest) if not group.branches)
        if not self.reports:
            return windows
        n, count = len(self), min(len(self), MEASURED)
        reports = [report for k in range(count) for report in self._report(self.shards.meta(k * n // count))]
        self.report_room = max((len(report.ids) for report in reports), default=0)
        whole = len(ecg_ids(self.tokenizer, self.vocabulary, self.shards.ids(longest), self.shards.meta(longest)["gains"])) + self.report_room
        return whole + windows * self.windows


def micro_batch(groups: list[Group], ecgs: int) -> MicroBatch:
    row = pack(groups)
    return MicroBatch(row, targets=len(row.targets), tokens=len(row.input_ids), ecgs=ecgs)

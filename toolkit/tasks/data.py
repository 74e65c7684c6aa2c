"""Micro-batches for the language model: ECGs to forecast, or ECGs with their questions and reports."""

import numpy as np

from toolkit.shards.order import MicroBatch
from toolkit.shards.packing import pack
from toolkit.shards.reader import Shards
from toolkit.tasks.prompts import branch, forecast_group, task_group
from toolkit.tasks.vocabulary import ECGVocabulary


class ForecastData:
    """Pretraining: every ECG token is a target, and with `reports` the report after it. `inputs` is a `Packed` row."""

    def __init__(self, shards: Shards, tokenizer, vocabulary: ECGVocabulary, reports: bool = False):
        self.shards, self.tokenizer, self.vocabulary, self.reports = shards, tokenizer, vocabulary, reports

    def __len__(self) -> int:
        return len(self.shards)

    def key(self, index: int) -> str:
        return self.shards.key(index)

    def batch(self, samples: list[tuple[int, int]]) -> MicroBatch:
        groups = []
        for _, i in samples:
            meta = self.shards.meta(i) if self.reports or self.vocabulary.needs_gains else {}
            group = forecast_group(self.tokenizer, self.vocabulary, self.shards.ids(i), meta.get("gains"))
            if self.reports and meta["report"]:
                group.branches.append(branch(self.tokenizer, {"task": "report", "report": meta["report"]}))
            groups.append(group)
        return _micro_batch(groups)


class TaskData:
    """Instruction tuning: each ECG once with up to `tasks_per_ecg` of its tasks as branches, drawn anew every epoch from (seed, epoch, index)."""

    def __init__(self, shards: Shards, tokenizer, vocabulary: ECGVocabulary, tasks_per_ecg: int, seed: int):
        self.shards, self.tokenizer, self.vocabulary, self.tasks_per_ecg, self.seed = shards, tokenizer, vocabulary, tasks_per_ecg, seed

    def __len__(self) -> int:
        return len(self.shards)

    def key(self, index: int) -> str:
        return self.shards.key(index)

    def batch(self, samples: list[tuple[int, int]]) -> MicroBatch:
        groups = []
        for epoch, i in samples:
            meta = self.shards.meta(i)
            tasks = meta["tasks"]
            if len(tasks) > self.tasks_per_ecg:
                drawn = np.random.default_rng([self.seed, epoch, i]).permutation(len(tasks))[: self.tasks_per_ecg]
                tasks = [tasks[k] for k in sorted(drawn)]
            groups.append(task_group(self.tokenizer, self.vocabulary, self.shards.ids(i), meta["gains"], tasks))
        return _micro_batch(groups)


def _micro_batch(groups: list) -> MicroBatch:
    row = pack(groups)
    return MicroBatch(row, targets=len(row.targets), tokens=len(row.input_ids), ecgs=len(groups))

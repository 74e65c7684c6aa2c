"""Micro-batches of instruction tuning: ECGs with their questions and reports, of one or several datasets, and text between them.

A sample is an ECG (or the two of a comparison) with all its tasks; a micro-batch is one padding-free row of samples. See prompts.py for what is shared.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import numpy as np

from toolkit.errors import UserError
from toolkit.shards.order import BLOCK, MicroBatch, block_counts, mixed_at, sample_at
from toolkit.shards.packing import Group, Sequence
from toolkit.shards.reader import Shards
from toolkit.tasks.data import micro_batch
from toolkit.tasks.mixture import ALL, EVERYTHING, TEXT, Share
from toolkit.tasks.prompts import Prompts, task_groups
from toolkit.tasks.vocabulary import ECGVocabulary


class TaskData:
    """The samples of task shards that hold a task of a share of the `mixture`, and those of `text` (int [n, WINDOW], of `mixture.read_text`).

    tasks_per_ecg: most tasks of a sample and epoch, drawn anew every epoch from (seed, epoch, sample); 0: all. context: most tokens that ECGs, prompt and
    answer may have: an answer that is too long is cut, a task without room for any of its answer left out; `cut` and `left_out` count those.
    features: what gives the continuous ones of a sample's code tokens, from its shards, codes and json.
    Raises UserError naming --tasks, --text, or --backbone where its context does not hold the ECGs.
    """

    samples_per_row = 1

    def __init__(
        self,
        shards: list[Shards],
        tokenizer,
        vocabulary: ECGVocabulary,
        prompts: Prompts,
        seed: int = 0,
        tasks_per_ecg: int = 0,
        mixture: tuple[Share, ...] = (EVERYTHING,),
        text: np.ndarray | None = None,
        context: int | None = None,
        features: Callable[[Shards, np.ndarray, dict], np.ndarray] | None = None,
    ):
        self.shards, self.tokenizer, self.vocabulary, self.prompts = shards, tokenizer, vocabulary, prompts
        self.seed, self.tasks_per_ecg, self.mixture, self.text, self.context, self.features = seed, tasks_per_ecg, mixture, text, context, features
        self.cut = self.left_out = 0
        self._starts = list(accumulate(map(len, shards), initial=0))
        self._streams = _streams(mixture, shards, text)
        self._sizes = [len(stream) for stream in self._streams]
        self._offsets = list(accumulate(self._sizes, initial=0))
        self._counts = _counts(mixture)
        if context is not None:
            self._check_context()

    def __len__(self) -> int:
        """Samples of an epoch: so many that those of the tasks come once on average; text between them makes it longer."""
        if self._counts is None:
            return self._offsets[-1]
        own = [(size, count) for share, size, count in zip(self.mixture, self._sizes, self._counts) if share.name != TEXT]
        return round(sum(size for size, _ in own) * BLOCK / sum(count for _, count in own))

    def at(self, seed: int, position: int) -> tuple[int, int]:
        if self._counts is None:
            return sample_at(seed, self._offsets[-1], position)
        stream, epoch, index = mixed_at(seed, self._sizes, self._counts, position)
        return epoch, self._offsets[stream] + index

    @property
    def firsts(self) -> list[int]:
        """The first index of each share."""
        return self._offsets[:-1]

    @property
    def shares(self) -> str:
        """How many of the samples are of which share, in words; of a mixture without weights nothing."""
        return ", ".join(f"{share.name} {100 * count / BLOCK:g} %" for share, count in zip(self.mixture, self._counts or ()))

    def key(self, index: int) -> str:
        share, sample = self._find(index)
        if share.name == TEXT:
            return f"text-{sample}"
        shards, i = self._shard(sample)
        return shards.key(i)

    def batch(self, samples: list[tuple[int, int]]) -> MicroBatch:
        found = [self._groups(epoch, index) for epoch, index in samples]
        groups = [group for groups, _ in found for group in groups]
        nothing = Group(Sequence(np.array([self.tokenizer.eos_token_id]), np.zeros(1, bool)), [])  # no task of these samples has room
        return micro_batch(groups or [nothing], sum(ecgs for _, ecgs in found))

    def sample(self, index: int) -> tuple[np.ndarray, dict, list[dict]]:
        """Codes uint16 [n_ecgs, 313], json (with `features`, if the ECGs have them) and all tasks of the share that an index of `at` names; not of text."""
        share, sample = self._find(index)
        shards, i = self._shard(sample)
        codes, meta = shards.ids(i), shards.meta(i)
        if self.features:
            meta["features"] = self.features(shards, codes, meta)
        return codes, meta, [task for task in meta["tasks"] if share.wants(task)]

    def tasks(self, index: int) -> list[dict]:
        """The tasks of `sample`, whose ECGs are not read."""
        share, sample = self._find(index)
        shards, i = self._shard(sample)
        return [task for task in shards.meta(i)["tasks"] if share.wants(task)]

    def _find(self, index: int) -> tuple[Share, int]:
        """The share and the sample (of all shards, or of the text) that an index of `at` names."""
        stream = bisect_right(self._offsets, index) - 1
        return self.mixture[stream], int(self._streams[stream][index - self._offsets[stream]])

    def _shard(self, sample: int) -> tuple[Shards, int]:
        folder = bisect_right(self._starts, sample) - 1
        return self.shards[folder], sample - self._starts[folder]

    def _groups(self, epoch: int, index: int) -> tuple[list[Group], int]:
        """A sample's groups, and how many ECGs are in them."""
        share, sample = self._find(index)
        if share.name == TEXT:
            return [text_group(self.tokenizer, self.text[sample])], 0
        codes, meta, tasks = self.sample(index)
        if self.tasks_per_ecg and len(tasks) > self.tasks_per_ecg:
            drawn = np.random.default_rng([self.seed, epoch, sample]).permutation(len(tasks))[: self.tasks_per_ecg]
            tasks = [tasks[k] for k in sorted(drawn)]
        groups = task_groups(self.tokenizer, self.vocabulary, self.prompts, codes, meta, tasks)
        return (groups if self.context is None else [fitting for group in groups if (fitting := self._fit(group))]), len(codes)

    def _fit(self, group: Group) -> Group | None:
        """The group with answers that end at the context, without the tasks of whose answer nothing is left; None if none is left."""
        if not group.branches:
            kept = self._cut(group.prefix, self.context)
            return Group(kept, []) if kept else None
        kept = [part for one in group.branches if (part := self._cut(one, self.context - len(group.prefix.ids)))]
        return Group(group.prefix, kept) if kept else None

    def _cut(self, sequence: Sequence, room: int) -> Sequence | None:
        if len(sequence.ids) <= room:
            return sequence
        kept = replace(sequence, ids=sequence.ids[: max(room, 0)], target=sequence.target[: max(room, 0)])  # of a prompt that is cut nothing is left
        self.cut += kept.target.any()
        self.left_out += not kept.target.any()
        return kept if kept.target.any() else None

    def _check_context(self) -> None:
        longest = max(int((shards.rows["n_ecgs"].astype(int) * shards.rows["n_tokens"]).max()) for shards in self.shards)
        if longest >= self.context:
            raise UserError(f"--backbone: its context of {self.context} tokens does not hold the {longest} of a sample's ECGs; use another backbone")


def text_group(tokenizer, sample: np.ndarray) -> Group:
    """A sample of --text, after what the tokenizer itself puts before a text (SmolLM2's has a BOS and does not): every token is a target but the first."""
    ids = np.concatenate([np.array(tokenizer("").input_ids, np.int64), sample.astype(np.int64)])
    return Group(Sequence(ids, np.arange(len(ids)) >= 1), [])


def _counts(mixture: tuple[Share, ...]) -> tuple[int, ...] | None:
    """What `mixed_at` takes; None without weights: then all samples are one stream."""
    if mixture[0].weight is None:
        return None
    try:
        return block_counts([share.weight for share in mixture])
    except ValueError as error:
        raise UserError(f"--tasks: {error}; raise the smallest weight") from None


def _streams(mixture: tuple[Share, ...], shards: list[Shards], text: np.ndarray | None) -> list[np.ndarray]:
    """Of each share the samples that hold a task of it, numbered over all shards; of `text` its rows. Raises UserError naming --tasks."""
    if (text is not None) != any(share.name == TEXT for share in mixture):
        raise UserError("--text and --tasks go together: give the text its share, as in --tasks all:0.9,text:0.1 --text FILE")
    found: dict[str, list[int]] = {share.name: [] for share in mixture}
    if set(found) - {ALL, TEXT}:  # 5 s for 157,000 ECGs with 5 tasks each
        number = 0
        for folder in shards:
            for i in range(len(folder)):
                tasks = folder.meta(i)["tasks"]
                for share in mixture:
                    if any(share.wants(task) for task in tasks):
                        found[share.name].append(number)
                number += 1
    streams = []
    for share in mixture:
        whole = len(text) if share.name == TEXT else sum(map(len, shards)) if share.name == ALL else None
        streams.append(np.array(found[share.name], np.int64) if whole is None else np.arange(whole))
        if not len(streams[-1]):
            kinds = sorted({kind for folder in shards for kind in folder.index["splits"][folder.split].get("tasks", ())})
            raise UserError(f"--tasks: there is no {share.name!r} in split {shards[0].split!r} of the shards; it has {', '.join(kinds)} (ecgqa: all questions)")
    return streams

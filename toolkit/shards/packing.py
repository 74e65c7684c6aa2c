"""Padding-free rows: whole sequences laid end to end, each a prefix and branches that share it.

A group is a prefix (one ECG, or the two of a comparison) and any number of branches (a question with its answer each). A branch sees
the prefix and itself, never another branch or group; its positions go on where the prefix ends. A group without branches is a plain sequence.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Sequence:
    """Token ids int [n] and which of them are to be predicted, bool [n] (never the first token of a prefix: nothing precedes it).

    features: float [k, D], what k of the tokens, in their order, are instead of a row of the embedding; which ones the model knows.
    """

    ids: np.ndarray
    target: np.ndarray
    features: np.ndarray | None = None


@dataclass
class Group:
    prefix: Sequence
    branches: list[Sequence]


@dataclass
class Packed:
    """One row of several groups.

    input_ids, position_ids: int64 [n]
    predict_at: int64 [m], the places whose logits are needed; targets: int64 [m], the token each of them must predict
    layout: per group (start, end of the prefix, lengths of the branches), all that attention needs to know
    features: float [k, D] of all sequences, None where none has any
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    predict_at: np.ndarray
    targets: np.ndarray
    layout: list[tuple[int, int, tuple[int, ...]]]
    features: np.ndarray | None = None


def pack(groups: list[Group]) -> Packed:
    """Lay groups end to end. The first token of a branch is predicted from the last token of its prefix only if marked as target."""
    ids, positions, predict_at, targets, features, layout, start = [], [], [], [], [], [], 0
    for group in groups:
        prefix_end = start + len(group.prefix.ids)
        layout.append((start, prefix_end, tuple(len(b.ids) for b in group.branches)))
        at = start
        for sequence in (group.prefix, *group.branches):
            first_position = 0 if sequence is group.prefix else prefix_end - start
            ids.append(sequence.ids)
            positions.append(np.arange(first_position, first_position + len(sequence.ids)))
            marked = np.flatnonzero(sequence.target)
            before = at + marked - 1
            if len(marked) and marked[0] == 0:
                if sequence is group.prefix:
                    raise ValueError("the first token of a prefix has nothing before it and cannot be a target")
                before[0] = prefix_end - 1
            predict_at.append(before)
            targets.append(sequence.ids[marked])
            if sequence.features is not None:
                features.append(sequence.features)
            at += len(sequence.ids)
        start = at
    arrays = [np.concatenate(parts).astype(np.int64) for parts in (ids, positions, predict_at, targets)]
    return Packed(*arrays, layout, np.concatenate(features) if features else None)

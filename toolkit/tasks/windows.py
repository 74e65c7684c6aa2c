"""The objective of the authors' release: five windows of an ECG's tokens, each followed by a step that is to be predicted (58 tokens of 313).

The release closes each sequence with an end and an end-of-text token, without loss on them; nothing sees what stands last in a sequence, so the
loss and the gradient are the same without. It pads the five to the longest, which leaves 39 % of what it computes to ECGs; here they are packed.
"""

import numpy as np

from toolkit.shards.packing import Group, Sequence

WINDOWS, STEPS = (283, 142, 70, 35, 17), (30, 15, 7, 4, 2)  # tokens, model/heartllm.py of the release
LEAST = WINDOWS[-1] + STEPS[-1]  # tokens of the shortest ECG that gives a sequence


def window_starts(n_tokens: int, seed: int, epoch: int, index: int) -> list[tuple[int, int, int]]:
    """(start, window, step) of each scale that fits an ECG of `n_tokens`: one start, a multiple of the step, each as likely as the others.

    Drawn from (seed, epoch, index), one number a scale whether or not it fits, so that a resumed run draws the same.
    """
    drawn = np.random.default_rng([seed, epoch, index]).random(len(WINDOWS))
    scales = [(u, window, step, (n_tokens - window) // step) for u, window, step in zip(drawn, WINDOWS, STEPS)]
    return [(int(u * places) * step, window, step) for u, window, step, places in scales if places > 0]


def window_groups(opening: np.ndarray, tokens: np.ndarray, starts: list[tuple[int, int, int]]) -> list[Group]:
    """A plain sequence a scale: `opening` (int64 [m], what comes before an ECG), the window and its step, of which the step alone is target.

    tokens: int64 [n], the ECG.
    """
    groups = []
    for start, window, step in starts:
        ids = np.concatenate([opening, tokens[start : start + window + step]])
        target = np.zeros(len(ids), bool)
        target[-step:] = True
        groups.append(Group(Sequence(ids, target), []))
    return groups

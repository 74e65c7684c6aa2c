"""What a model must beat to have learnt anything of the order of ECG tokens."""

import numpy as np

from toolkit.shards.reader import Shards

COUNTED = 50_000  # ECGs: 16 M tokens, about 12,000 of each code, settle a frequency to about 1 %


def unigram_entropy(train: Shards, valid: Shards, chosen: list[int], codes: int) -> float:
    """Cross-entropy in nats per token of the chosen samples of `valid` under the token frequencies of `train` (add-one smoothed)."""

    def count(shards: Shards, indices) -> np.ndarray:
        return sum((np.bincount(shards.ids(i).ravel(), minlength=codes) for i in indices), np.zeros(codes, np.int64))

    frequencies, occurs = count(train, range(min(len(train), COUNTED))) + 1, count(valid, chosen)
    return float(-(occurs * np.log(frequencies / frequencies.sum())).sum() / occurs.sum())

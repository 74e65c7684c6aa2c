"""What a model must beat to have learnt anything of the order of ECG tokens."""

import numpy as np

from toolkit.shards.reader import Shards

COUNTED = 50_000  # ECGs: 16 M tokens settle 1,296 frequencies to far below 1 %


def unigram_entropy(train: Shards, valid: Shards, codes: int) -> float:
    """Cross-entropy in nats per token of `valid` under the token frequencies of `train` (add-one smoothed)."""
    counts = [sum((np.bincount(s.ids(i).ravel(), minlength=codes) for i in range(min(len(s), COUNTED))), np.zeros(codes, np.int64)) for s in (train, valid)]
    frequencies = (counts[0] + 1) / (counts[0] + 1).sum()
    return float(-(counts[1] * np.log(frequencies)).sum() / counts[1].sum())

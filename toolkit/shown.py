"""What a model can show of itself at a step, beside numbers."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Shown:
    """Name -> what there is to see.

    images: uint8 [height, width, 3]
    histograms: counts [n], how often each of the values 0 to n - 1 occurs
    """

    texts: dict[str, str] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)
    histograms: dict[str, np.ndarray] = field(default_factory=dict)

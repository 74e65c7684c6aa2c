"""What the trainers call: the summed loss of a packed row, and its logits."""

import torch
from torch.nn import functional as F

from toolkit.shards.packing import Packed


def packed_loss(model, row: Packed, device) -> torch.Tensor:
    """Sum (not mean) of the cross-entropy over the row's targets, float32 scalar.

    `model` is the engine or module with `heartspeed_packed` attention; logits are computed at the places of targets alone.
    """
    logits = packed_logits(model, row, device)
    return F.cross_entropy(logits.float(), torch.from_numpy(row.targets).to(device), reduction="sum")


def packed_logits(model, row: Packed, device) -> torch.Tensor:
    """Logits [len(row.targets), vocabulary] at `row.predict_at`."""
    place = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    return model(
        input_ids=place(row.input_ids)[None],
        position_ids=place(row.position_ids)[None],
        layout=row.layout,
        use_cache=False,  # with a cache transformers builds masks of its own, that see across documents
        logits_to_keep=place(row.predict_at),
    ).logits[0]

"""How far each adapted weight has moved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from secura_ds.analysis.weights import AdaptedWeight


class Change(NamedTuple):
    """Of one weight: ||W+ - W|| / ||W|| (Frobenius), root mean square and largest element of W+ - W."""

    relative_change: float
    root_mean_square: float
    largest: float


def weight_changes(weights: Iterable[AdaptedWeight]) -> Iterator[tuple[str, Change]]:
    """Each layer's name and change. An all-zero weight has the relative change 0, as in `statistics.jsonl`.

    Overwrites `after`.
    """
    for weight in weights:
        difference = weight.after.sub_(weight.before)
        # Squares are summed in double: fp32 loses digits over tens of millions of elements.
        norm = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
        before = float(torch.linalg.vector_norm(weight.before, dtype=torch.float64))
        yield (
            weight.module,
            Change(
                norm / before if before else 0.0,
                norm / difference.numel() ** 0.5,
                float(difference.abs().max()),
            ),
        )

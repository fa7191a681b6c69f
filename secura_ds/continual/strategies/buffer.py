"""The buffer of replay: some examples of each earlier task, as many of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def buffered(earlier: Sequence[Sequence[T]], size: int, seed: int) -> list[T]:
    """What a buffer of `size` examples holds after the tasks whose examples are `earlier`, in their order.

    Each task has the same share, the first ones one more where it does not divide. A task's share is a prefix
    of one random order, so that a buffer for more tasks holds nothing that the one before did not hold.

    Raises:
        ValueError: there are more tasks than places.
    """
    if len(earlier) > size:
        raise ValueError(f"a buffer of {size} examples cannot hold one of each of {len(earlier)} tasks")
    kept: list[T] = []
    for number, examples in enumerate(earlier):
        share = size // len(earlier) + (number < size % len(earlier))
        order = np.random.default_rng([seed, number]).permutation(len(examples))
        kept += [examples[i] for i in order[:share]]
    return kept

"""Gradient norms over training: mean, range and variance (the paper's Figure 2)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class NormStatistics(NamedTuple):
    """Of the L2 norms of all logged steps, before clipping. The variance is over n, not n - 1."""

    mean: float
    variance: float
    smallest: float
    largest: float
    steps: int

    @property
    def deviation(self) -> float:
        """The standard deviation."""
        return self.variance**0.5

    @property
    def range(self) -> float:
        """Largest minus smallest."""
        return self.largest - self.smallest


def norm_statistics(norms: Sequence[float]) -> NormStatistics:
    """The statistics of at least one finite norm.

    Raises:
        ValueError: there is none.
    """
    if not norms:
        raise ValueError("no gradient norm is given")
    return NormStatistics(
        statistics.fmean(norms), statistics.pvariance(norms), min(norms), max(norms), len(norms)
    )

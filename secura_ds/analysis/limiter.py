"""How S-MagNorm's limiter M is distributed over the elements of each adapted weight (method.md section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from secura_ds.adapter.config import SecuraConfig
from secura_ds.analysis.weights import trained_weight
from secura_ds.checkpoint_files import Checkpoint
from secura_ds.errors import UserError
from secura_ds.merge.adapter_file import CONFIG_NAME, AdapterFile, Parts
from secura_ds.merge.edits import plan_edits
from secura_ds.method import cabr
from secura_ds.method.smagnorm import absolute_eps, absolute_mean, limiter, ratio
from secura_ds.sharding import Restraint

LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

BINS = 2**14
"""M lies in 1..2; a quantile is read off a histogram, at most one of these bins wrong."""


class LimiterStatistics(NamedTuple):
    """Of one weight: M's mean, extremes and quantiles at `LEVELS`; the largest ratio |D| / (|W| + eps)."""

    mean: float
    smallest: float
    largest: float
    quantiles: tuple[float, ...]
    ratio_max: float


@torch.no_grad()
def limiter_statistics(base: Checkpoint, adapter: AdapterFile) -> Iterator[tuple[str, LimiterStatistics]]:
    """Each adapted layer's name and limiter, as a merge of the adapter would limit its update now.

    Raises:
        UserError: the adapter is no SECURA adapter, has no S-MagNorm, or does not belong to the base.
    """
    where = adapter.folder / CONFIG_NAME
    if adapter.kind != "SECURA":
        raise UserError(f"{where}: peft_type is {adapter.kind}; only SECURA adapters have a limiter")
    config = SecuraConfig.from_pretrained(str(adapter.folder))
    restraint = config.restraint
    if restraint is None:
        raise UserError(f"{where}: smagnorm.apply is 'never', so there is no limiter; give another adapter")
    plan_edits(base, adapter, "trained")  # refuses what does not belong together
    for module, parts in adapter.modules.items():
        weight = parts["W"].read().float() if "W" in parts else trained_weight(base, adapter, module)
        yield module, _statistics(weight, parts, config.scaling, restraint)


def _statistics(W: Tensor, parts: Parts, scaling: float, restraint: Restraint) -> LimiterStatistics:
    """One weight's statistics, in row blocks: a first pass for the largest ratio, a second for M."""
    C, R = parts["C"].read(), parts["R"].read().float()
    core = cabr.core(parts["A"].read(), parts["B"].read(), parts["U"].read())
    mean = absolute_mean(W) if restraint.eps_relative is not None else 0.0
    eps = absolute_eps(mean, restraint.eps, restraint.eps_relative)

    def ratios() -> Iterator[Tensor]:
        for rows in cabr.row_blocks(*W.shape):
            yield ratio(W[rows], cabr.update_block(C, core, R, scaling, rows), eps)

    ratio_max = max(float(block.max()) for block in ratios())
    counts = torch.zeros(BINS, dtype=torch.float64)
    total, low, high = 0.0, 2.0, 1.0
    for block in ratios():
        M = limiter(block, ratio_max, restraint.steepness, out=block)
        counts += torch.histc(M, BINS, 1.0, 2.0).double()
        total += float(M.double().sum())
        low, high = min(low, float(M.min())), max(high, float(M.max()))
    return LimiterStatistics(total / W.numel(), low, high, _quantiles(counts), ratio_max)


def _quantiles(counts: Tensor) -> tuple[float, ...]:
    """M at each level: the upper edge of the bin in which that part of all elements is reached."""
    reached = counts.cumsum(0) / counts.sum()
    return tuple(1 + (int(torch.searchsorted(reached, level)) + 1) / BINS for level in LEVELS)

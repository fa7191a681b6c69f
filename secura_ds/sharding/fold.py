"""M1 folds and statistics on each rank's own slice of a weight, without gathering it (method.md section 6).

A rank that holds elements [start, end) of the row-major weight computes, on the absolute row grid of
`cabr.row_blocks`, every block of D that its slice touches and uses its part of it. The grid makes the
matrix products, and so the result, bit-equal for any number of ranks and any boundary between them.
A weight that is not sharded is one slice, so plain models take the same path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secura_ds.errors import UserError
from secura_ds.method.cabr import row_blocks, update_block
from secura_ds.method.smagnorm import Form, absolute_eps, limiter, ratio, restrain
from secura_ds.sharding.partition import full_shape, is_available, is_sharded


class Restraint(NamedTuple):
    """How S-MagNorm limits an update: exactly one of `eps` and `eps_relative` is set."""

    steepness: float = 6.0
    form: Form = "update"
    eps: float | None = 1e-10
    eps_relative: float | None = None


class SliceUpdate(NamedTuple):
    """The update D = scaling C core R of one weight (out, in), taken whole where there is no `restraint`."""

    weight: Tensor
    C: Tensor
    core: Tensor
    R: Tensor
    scaling: float
    restraint: Restraint | None


class Slice(NamedTuple):
    """The part of a weight that this rank holds: its flat elements [start, end), writable in place."""

    values: Tensor
    start: int
    end: int


def local_slice(weight: Tensor) -> Slice:
    """This rank's slice of `weight`, without the padding at its end; all of it where nothing is sharded.

    Raises:
        UserError: the slices are not in memory, or are stored twice or quantized by DeepSpeed.
    """
    if not is_sharded(weight):
        return Slice(weight.detach().view(-1), 0, weight.numel())
    values: Tensor = weight.ds_tensor.data
    if weight.ds_tensor.status.name != "AVAILABLE":
        raise UserError(
            "a weight's slices are on NVMe, where M1 cannot fold: use strategy 'M2' or offload to CPU"
        )
    if weight.ds_secondary_tensor is not None or hasattr(weight.ds_tensor, "ds_quant_scale"):
        raise UserError(
            "M1 cannot fold weights that DeepSpeed keeps twice (zero_hpz_partition_size) or quantized "
            "(zero_quantized_nontrainable_weights): turn those off or use strategy 'M2'"
        )
    start = min(values.numel() * weight.ds_zero_partition_rank, weight.ds_numel)
    end = min(start + values.numel(), weight.ds_numel)
    return Slice(values[: end - start], start, end)


@torch.no_grad()
def fold_slices(updates: Sequence[SliceUpdate]) -> None:
    """Write W+ (or W + D) over each weight, in place, on the slice that this rank holds.

    Collective for sharded weights: one all-reduce of one float per layer for all layers together (and one
    more where `eps_relative` needs the mean of |W|). Extra memory is a few row blocks.
    """
    pieces = [local_slice(update.weight) for update in updates]
    eps = _eps(updates, pieces)
    maxima = _largest_ratios(updates, pieces, eps)
    for i, (update, piece) in enumerate(zip(updates, pieces, strict=True)):
        if update.restraint is not None and maxima[i] == 0:
            continue
        for w, d in _blocks(update, piece):
            w.copy_(_changed(w, d, update.restraint, eps[i], maxima[i]))
        if is_sharded(update.weight) and is_available(update.weight):
            # A whole copy kept from an earlier gather (a persistent parameter) would be stale.
            update.weight.partition()


class Statistics(NamedTuple):
    """What an update does to one weight: max L, mean of M (1 without restraint), ||W+ - W|| / ||W||."""

    ratio_max: float
    limiter_mean: float
    relative_change: float


@torch.no_grad()
def slice_statistics(updates: Sequence[SliceUpdate]) -> list[Statistics]:
    """Statistics of each update, in row blocks of the slices; collective for sharded weights."""
    pieces = [local_slice(update.weight) for update in updates]
    eps = _eps(updates, pieces)
    maxima = _largest_ratios(updates, pieces, eps)
    sums = torch.zeros(len(updates), 3, dtype=torch.float64, device=maxima.device)
    for i, (update, piece) in enumerate(zip(updates, pieces, strict=True)):
        for w, d in _blocks(update, piece):
            restraint = update.restraint
            changed = _changed(w, d, restraint, eps[i], maxima[i])
            sums[i, 0] += _limiter_sum(w, d, restraint, eps[i], maxima[i])
            sums[i, 1] += (changed - w).double().square().sum()
            sums[i, 2] += w.double().square().sum()
    _reduce(sums, updates, "SUM")
    result = []
    for i, update in enumerate(updates):
        total, change, norm = sums[i].tolist()
        relative = (change / norm) ** 0.5 if norm else 0.0
        result.append(Statistics(float(maxima[i]), total / full_shape(update.weight).numel(), relative))
    return result


def _changed(w: Tensor, d: Tensor, restraint: Restraint | None, eps: float, ratio_max: Tensor) -> Tensor:
    if restraint is None:
        return w + d
    return restrain(
        w,
        d,
        ratio_max=ratio_max.to(w.device),
        eps_abs=eps,
        steepness=restraint.steepness,
        form=restraint.form,
    )


def _limiter_sum(
    w: Tensor, d: Tensor, restraint: Restraint | None, eps: float, ratio_max: Tensor
) -> Tensor | int:
    if restraint is None:
        return w.numel()
    return limiter(ratio(w, d, eps), ratio_max.to(w.device), restraint.steepness).double().sum()


def _blocks(update: SliceUpdate, piece: Slice) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat pieces of the slice and of D, one for each block of the absolute grid that the slice touches."""
    num_rows, num_columns = full_shape(update.weight)
    for rows in row_blocks(num_rows, num_columns):
        first, last = rows.start * num_columns, rows.stop * num_columns
        low, high = max(first, piece.start), min(last, piece.end)
        if low < high:
            block = update_block(update.C, update.core, update.R, update.scaling, rows).view(-1)
            d = block[low - first : high - first].to(piece.values.device)
            yield piece.values[low - piece.start : high - piece.start], d


def _eps(updates: Sequence[SliceUpdate], pieces: Sequence[Slice]) -> list[float]:
    """The absolute eps of each layer; the mean of |W| is summed in double, so cuts do not show in fp32."""
    restraints = [update.restraint or Restraint() for update in updates]
    means = [0.0] * len(updates)
    if any(restraint.eps_relative is not None for restraint in restraints):
        totals = torch.zeros(len(updates), dtype=torch.float64, device=updates[0].core.device)
        for i, (update, piece) in enumerate(zip(updates, pieces, strict=True)):
            in_slice = range(0, piece.end - piece.start, _CHUNK)
            totals[i] = sum(piece.values[at : at + _CHUNK].double().abs().sum() for at in in_slice)
            totals[i] /= full_shape(update.weight).numel()
        _reduce(totals, updates, "SUM")
        means = totals.float().tolist()
    return [float(absolute_eps(m, r.eps, r.eps_relative)) for m, r in zip(means, restraints, strict=True)]


_CHUNK = 2**20


def _largest_ratios(updates: Sequence[SliceUpdate], pieces: Sequence[Slice], eps: Sequence[float]) -> Tensor:
    """max L of each whole weight, (layers,) fp32."""
    maxima = torch.zeros(len(updates), device=updates[0].core.device)
    for i, (update, piece) in enumerate(zip(updates, pieces, strict=True)):
        for w, d in _blocks(update, piece):
            maxima[i] = torch.maximum(maxima[i], ratio(w, d, eps[i]).amax().to(maxima.device))
    _reduce(maxima, updates, "MAX")
    return maxima


def _reduce(values: Tensor, updates: Sequence[SliceUpdate], operation: str) -> None:
    """All-reduce the entries of sharded weights, in one call; what every rank computed whole stays."""
    indices = [i for i, update in enumerate(updates) if is_sharded(update.weight)]
    if indices:
        group = updates[indices[0]].weight.ds_process_group
        shared = values[indices]
        torch.distributed.all_reduce(shared, getattr(torch.distributed.ReduceOp, operation), group=group)
        values[indices] = shared

"""M1 folds and statistics on each rank's own slice of a weight, without gathering it (method.md section 6).

A rank that holds elements [start, end) of the row-major weight computes, on the absolute row grid of
`cabr.row_blocks`, every block of D that its slice touches and uses its part of it. The grid makes the
matrix products, and so the result, bit-equal for any number of ranks and any boundary between them.
A weight that is not sharded is one slice, so plain models take the same path.

Beside the slices lives one workspace for all layers: a row block of D in fp32, two pieces of one for W and
M, and R in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secura_ds.method.cabr import block_elements, block_height, compute_dtype, row_blocks, update_block
from secura_ds.method.smagnorm import Form, absolute_eps, limiter, ratio, restrain
from secura_ds.reused_memory import ReusedMemory
from secura_ds.sharding.slices import Slice, local_slice


class Restraint(NamedTuple):
    """How S-MagNorm limits an update: exactly one of `eps` and `eps_relative` is set."""

    steepness: float = 6.0
    form: Form = "update"
    eps: float | None = 1e-10
    eps_relative: float | None = None


class SliceUpdate(NamedTuple):
    """The update D = scaling C core R of one weight (out, in), taken whole where there is no `restraint`.

    `eps` is the absolute eps where it is known already, which saves reading and reducing mean|W|.
    """

    weight: Tensor
    C: Tensor
    core: Tensor
    R: Tensor
    scaling: float
    restraint: Restraint | None
    eps: float | None = None


class Statistics(NamedTuple):
    """What an update does to one weight: max L, mean of M (1 without restraint), ||W+ - W|| / ||W||."""

    ratio_max: float
    limiter_mean: float
    relative_change: float


@torch.no_grad()
def fold_slices(updates: Sequence[SliceUpdate], *, memory: ReusedMemory | None = None) -> None:
    """Write W+ (or W + D) over each weight, in place, on the slice that this rank holds.

    Collective for sharded weights: one all-reduce of one float per layer for all layers together, and one
    more where an eps relative to mean|W| is not known yet. Nothing else is sent.

    Args:
        memory: holds the first 128 MiB of D, in fp32, which then need not be formed again for the second
            pass. For one update at a time, on the CPU.

    Raises:
        UserError: slices that cannot be rewritten in place.
    """
    assert memory is None or len(updates) == 1, len(updates)
    layers = _layers(updates)
    space = _Workspace(layers, memory)
    maxima = torch.zeros(len(layers), device=space.w.device)
    if any(layer.restraint is not None for layer in layers):
        maxima = _largest_ratios(layers, space)
    at_rest = (maxima == 0).tolist()
    for layer, ratio_max, nothing in zip(layers, maxima, at_rest, strict=True):
        if layer.restraint is not None and nothing:
            continue
        for block in _blocks(layer, space, formed=memory is not None and layer.restraint is not None):
            layer.piece.write(block.low, block.high, _changed(block, layer, ratio_max, out=block.d))
        layer.piece.written()


@torch.no_grad()
def slice_statistics(updates: Sequence[SliceUpdate]) -> list[Statistics]:
    """Statistics of each update, in row blocks of the slices.

    Collective for sharded weights: as a fold, and one all-reduce of three sums per layer. For 4-bit weights
    all of it refers to the dequantized weight.

    Raises:
        UserError: slices that cannot be read.
    """
    layers = _layers(updates)
    space = _Workspace(layers)
    maxima = _largest_ratios(layers, space)
    sums = torch.zeros(len(layers), 3, dtype=torch.float64, device=maxima.device)
    for row, layer, ratio_max in zip(sums, layers, maxima, strict=True):
        for block in _blocks(layer, space):
            row[0] += _limiter_sum(block, layer, ratio_max)
            change = _changed(block, layer, ratio_max, out=block.d).sub_(block.w)
            row[1] += change.double().square_().sum()
            row[2] += block.w.double().square_().sum()
    _reduce(sums, layers, "SUM")
    result = []
    for (total, change, norm), ratio_max, layer in zip(sums.tolist(), maxima.tolist(), layers, strict=True):
        relative = (change / norm) ** 0.5 if norm else 0.0
        result.append(Statistics(ratio_max, total / layer.piece.shape.numel(), relative))
    return result


@torch.no_grad()
def absolute_epsilons(updates: Sequence[SliceUpdate]) -> list[float]:
    """The absolute eps of each layer, `update.eps` where that is known.

    Collective for sharded weights if any depends on a mean|W| that is not known: one all-reduce of one
    double per layer. The mean is summed in double, so that cuts do not show in fp32. An M1 fold needs it
    before it can look for max L, so the two reductions cannot be one; but every forward pass in which
    S-MagNorm acts has made it known already, and under M2 it never changes.
    """
    restraints = [update.restraint or Restraint() for update in updates]
    means = [0.0] * len(updates)
    if any(u.eps is None and r.eps_relative is not None for u, r in zip(updates, restraints, strict=True)):
        layers = [_Layer(update, local_slice(update.weight), 0.0) for update in updates]
        space = _Workspace(layers)
        totals = torch.zeros(len(updates), dtype=torch.float64, device=space.w.device)
        for i, layer in enumerate(layers):
            for low in range(layer.piece.start, layer.piece.end, len(space.w)):
                high = min(low + len(space.w), layer.piece.end)
                totals[i] += layer.piece.read(low, high, space.w[: high - low]).double().abs_().sum()
            totals[i] /= layer.piece.shape.numel()
        _reduce(totals, layers, "SUM")
        means = totals.float().tolist()
    return [
        float(absolute_eps(mean, r.eps, r.eps_relative)) if update.eps is None else update.eps
        for update, mean, r in zip(updates, means, restraints, strict=True)
    ]


class _Layer(NamedTuple):
    """One update, the slice it acts on, and its absolute eps."""

    update: SliceUpdate
    piece: Slice
    eps: float

    @property
    def restraint(self) -> Restraint | None:
        return self.update.restraint


def _layers(updates: Sequence[SliceUpdate]) -> list[_Layer]:
    epsilons = absolute_epsilons(updates)
    return [_Layer(u, local_slice(u.weight), eps) for u, eps in zip(updates, epsilons, strict=True)]


# What follows the matrix product runs piece by piece, which a CPU's second-level cache should hold.
_CPU_PIECE = 2**18
_HELD = 2**25  # elements of D


class _Workspace:
    """Memory for any layer, where the adapters are: a row block of D, pieces of W and of what follows."""

    def __init__(self, layers: Sequence[_Layer], memory: ReusedMemory | None = None) -> None:
        """Take the memory; `memory` gives that of the blocks of D that stay, each at its own place."""
        example = layers[0].update
        device, dtype = example.C.device, compute_dtype(example.C, example.core, example.R)
        self.elements = block_elements(device)
        shapes = [layer.piece.shape for layer in layers]
        size = max(min(rows, block_height(columns, self.elements)) * columns for rows, columns in shapes)
        self.d = torch.empty(size, dtype=dtype, device=device)
        self.held = self.d[:0]
        if memory is not None:
            self.held = memory.take(min(_HELD, max(rows * columns for rows, columns in shapes)), dtype)
        piece = min(size, _CPU_PIECE) if device.type == "cpu" else size
        self.w, self.spare = (torch.empty(piece, dtype=dtype, device=device) for _ in range(2))


class _Block(NamedTuple):
    """Elements [low, high) of W and D, and memory of that size; all of it valid until the next block."""

    low: int
    high: int
    w: Tensor
    d: Tensor
    spare: Tensor


def _blocks(layer: _Layer, space: _Workspace, *, formed: bool = False) -> Iterator[_Block]:
    """The slice and D on it in pieces, D from the blocks of the absolute grid that the slice touches.

    With `formed` the blocks that stay are where an earlier pass over this layer left them.
    """
    update, piece = layer.update, layer.piece
    num_rows, num_columns = piece.shape
    R = update.R.to(space.d.dtype)
    for rows in row_blocks(num_rows, num_columns, space.elements):
        first, last = rows.start * num_columns, rows.stop * num_columns
        if first >= piece.end or last <= piece.start:
            continue
        stays = last <= len(space.held)
        D = space.held[first:last] if stays else space.d[: last - first]
        if not (formed and stays):
            update_block(update.C, update.core, R, update.scaling, rows, out=D.view(-1, num_columns))
        end = min(last, piece.end)
        for low in range(max(first, piece.start), end, len(space.w)):
            high = min(low + len(space.w), end)
            w = piece.read(low, high, space.w[: high - low])
            yield _Block(low, high, w, D[low - first : high - first], space.spare[: high - low])


def _changed(block: _Block, layer: _Layer, ratio_max: Tensor, out: Tensor) -> Tensor:
    restraint = layer.restraint
    if restraint is None:
        return torch.add(block.w, block.d, out=out)
    return restrain(
        block.w,
        block.d,
        ratio_max=ratio_max,
        eps_abs=layer.eps,
        steepness=restraint.steepness,
        form=restraint.form,
        scratch=block.spare,
        out=out,
    )


def _limiter_sum(block: _Block, layer: _Layer, ratio_max: Tensor) -> Tensor | int:
    if layer.restraint is None:
        return block.high - block.low
    L = ratio(block.w, block.d, layer.eps, out=block.spare)
    return limiter(L, ratio_max, layer.restraint.steepness, out=L).double().sum()


def _largest_ratios(layers: Sequence[_Layer], space: _Workspace) -> Tensor:
    """max L of each whole weight, (layers,)."""
    maxima = torch.zeros(len(layers), dtype=space.w.dtype, device=space.w.device)
    for i, layer in enumerate(layers):
        for block in _blocks(layer, space):
            L = ratio(block.w, block.d, layer.eps, out=block.spare)
            maxima[i] = torch.maximum(maxima[i], L.amax())
    _reduce(maxima, layers, "MAX")
    return maxima


def _reduce(values: Tensor, layers: Sequence[_Layer], operation: str) -> None:
    """All-reduce the entries of sharded weights, in one call; what every rank computed whole stays."""
    indices = [i for i, layer in enumerate(layers) if layer.piece.group is not None]
    if indices:
        shared = values[indices]
        reduction = getattr(torch.distributed.ReduceOp, operation)
        torch.distributed.all_reduce(shared, reduction, group=layers[indices[0]].piece.group)
        values[indices] = shared

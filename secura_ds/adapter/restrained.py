"""Linear map with the restrained weight W+, for `apply: forward` (method.md section 4).

y = x W+^T + b with W+ formed from the frozen weight in the forward pass and again in the backward pass; no
copy of it lives in between. The limiter M is a constant for the gradient: dD = dW+ / M with dW+ = dy^T x,
and d core = s C^T dD R^T.

Shapes: x (tokens, in), W (out, in), C (out, r), core (r, r), R (r, in), b (out,).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secura_ds.method.cabr import compute_dtype, row_blocks, update_block
from secura_ds.method.smagnorm import limiter, ratio, restrain
from secura_ds.sharding import Restraint

# Accelerators want few large kernels; CPUs want blocks that stay in cache, which the method's grid gives.
_ACCELERATOR_ELEMENTS = 2**24


class Update(NamedTuple):
    """What stays constant of D = scaling C core R, and how it is limited."""

    C: Tensor
    R: Tensor
    scaling: float
    restraint: Restraint
    eps: float


def restrained_weight(weight: Tensor, core: Tensor, update: Update) -> tuple[Tensor, Tensor]:
    """W+ (out, in) in `weight.dtype` and max L (0-d); an fp32 matrix of W's size lives meanwhile."""
    C, R, scaling, restraint, eps = update
    wide = compute_dtype(weight, C)
    R = R.to(wide)
    D = torch.empty(weight.shape, dtype=wide, device=weight.device)
    maxima = []
    for rows in _blocks(weight):
        D[rows] = update_block(C, core, R, scaling, rows)
        maxima.append(ratio(weight[rows], D[rows], eps).amax())
    ratio_max = torch.stack(maxima).amax()
    restrained = D if weight.dtype == wide else torch.empty_like(weight)
    for rows in _blocks(weight):
        restrained[rows] = restrain(
            weight[rows],
            D[rows],
            ratio_max=ratio_max,
            eps_abs=eps,
            steepness=restraint.steepness,
            form=restraint.form,
        )
    return restrained, ratio_max


def restrained_linear(
    x: Tensor, read_weight: Callable[[], Tensor], bias: Tensor | None, core: Tensor, update: Update
) -> Tensor:
    """x W+^T + b for x (..., in), differentiable in x and core.

    Args:
        read_weight: returns W (out, in); called in the forward and again in the backward pass, so that a
            sharded or 4-bit weight is held whole in neither of them for longer than needed.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False):
        dtype = torch.get_autocast_dtype(device) if autocast else update.C.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        y: Tensor = _RestrainedLinear.apply(flat, core, read_weight, bias, update)
    y = y.view(*x.shape[:-1], -1)
    return y if autocast else y.to(x.dtype)


class _RestrainedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        core: Tensor,
        read_weight: Callable[[], Tensor],
        bias: Tensor | None,
        update: Update,
    ) -> Tensor:
        restrained, ratio_max = restrained_weight(read_weight(), core, update)
        restrained = restrained.to(x.dtype)
        # The weight is reached through `read_weight`, never saved: ZeRO-3 frees and gathers it in between.
        ctx.save_for_backward(x, core, ratio_max)
        ctx.read_weight, ctx.update = read_weight, update
        return x @ restrained.T if bias is None else torch.addmm(bias.to(x.dtype), x, restrained.T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, core, ratio_max = ctx.saved_tensors
        dx, dcore = _gradients(gradients[0], x, core, ratio_max, ctx.read_weight(), ctx.update)
        return dx if ctx.needs_input_grad[0] else None, dcore, None, None, None


def _gradients(
    dy: Tensor, x: Tensor, core: Tensor, ratio_max: Tensor, weight: Tensor, update: Update
) -> tuple[Tensor, Tensor]:
    """dx (tokens, in) and d core (r, r): each row block of D, M and W+ is formed once and used for both."""
    C, R, scaling, restraint, eps = update
    wide = compute_dtype(weight, C)
    R = R.to(wide)
    restrained = torch.empty(weight.shape, dtype=x.dtype, device=weight.device)
    dcore = torch.zeros_like(core, dtype=wide)
    for rows in _blocks(weight):
        w, d = weight[rows].to(wide), update_block(C, core, R, scaling, rows)
        M = limiter(ratio(w, d, eps), ratio_max, restraint.steepness)
        dD = (dy[:, rows].T @ x).to(wide).div_(M)
        dcore += C[rows].to(wide).T @ (dD @ R.T)
        restrained[rows] = d.div_(M).add_(w) if restraint.form == "update" else _average(w, d, M, ratio_max)
    return dy @ restrained, (dcore * scaling).to(core.dtype)


def _average(w: Tensor, d: Tensor, M: Tensor, ratio_max: Tensor) -> Tensor:
    return torch.where(ratio_max > 0, w.mul(2.0).add_(d).div_(M), w)


def _blocks(weight: Tensor) -> Iterator[slice]:
    num_rows, num_columns = weight.shape
    if weight.device.type == "cpu":
        return row_blocks(num_rows, num_columns)
    height = max(1, _ACCELERATOR_ELEMENTS // num_columns)
    return (slice(start, min(start + height, num_rows)) for start in range(0, num_rows, height))

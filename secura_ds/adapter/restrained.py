"""Linear map with the restrained weight W+, for `apply: forward` (method.md section 4).

y = x W+^T + b with W+ formed from the frozen weight in the forward pass and again in the backward pass; no
copy of it lives in between. The limiter M is a constant for the gradient: dD = dW+ / M with dW+ = dy^T x,
and d core = s C^T dD R^T.

S-MagNorm is stated here a second time, in place and with the fastest kernels: `method.smagnorm` spends its
time on bits that do not depend on how a matrix is cut, which folds need and training steps do not. Tests
hold the two together to rounding.

Shapes: x (tokens, in), W (out, in), C (out, r), core (r, r), R (r, in), b (out,).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secura_ds.method.cabr import compute_dtype, row_blocks
from secura_ds.sharding import Restraint

# Of a row block: accelerators want few large kernels; CPUs want blocks that stay in cache.
_CPU_ELEMENTS = 2**18
_ACCELERATOR_ELEMENTS = 2**24


class Update(NamedTuple):
    """What stays constant of D = scaling C core R, and how it is limited; `eps` is absolute."""

    C: Tensor
    R: Tensor
    scaling: float
    restraint: Restraint
    eps: float


def restrained_linear(
    x: Tensor, read_weight: Callable[[], Tensor], bias: Tensor | None, core: Tensor, update: Update
) -> Tensor:
    """x W+^T + b for x (..., in), differentiable in x and core.

    Args:
        read_weight: returns W (out, in); called in the forward and again in the backward pass, so that a
            sharded or 4-bit weight is whole in neither of them for longer than needed.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False):
        dtype = torch.get_autocast_dtype(device) if autocast else update.C.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        y: Tensor = _RestrainedLinear.apply(flat, core, read_weight, bias, update)
    y = y.view(*x.shape[:-1], -1)
    return y if autocast else y.to(x.dtype)


@torch.no_grad()
def restrained_weight(weight: Tensor, core: Tensor, update: Update) -> tuple[Tensor, Tensor]:
    """W+ (out, in) in `weight.dtype` and max L (0-d); an fp32 matrix of W's size lives meanwhile."""
    left, right = _sides(core, update)
    D = torch.empty(weight.shape, dtype=right.dtype, device=weight.device)
    maxima = []
    for rows, w, buffer in _blocks(weight, D.dtype):
        d = torch.mm(left[rows], right, out=D[rows])
        maxima.append(_ratio(w, d, update.eps, out=buffer).amax())
    ratio_max = torch.stack(maxima).amax()
    restrained = D if weight.dtype == D.dtype else torch.empty_like(weight)
    for rows, w, buffer in _blocks(weight, D.dtype):
        M = _limiter(_ratio(w, D[rows], update.eps, out=buffer), ratio_max, update.restraint)
        _restrain(w, D[rows], M, update.restraint, out=restrained[rows])
    return restrained, ratio_max


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
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        (dy,) = gradients
        x, core, ratio_max = ctx.saved_tensors
        dcore, restrained = _backward_weight(dy, x, core, ratio_max, ctx.read_weight(), ctx.update)
        return dy @ restrained if ctx.needs_input_grad[0] else None, dcore, None, None, None


def _backward_weight(
    dy: Tensor, x: Tensor, core: Tensor, ratio_max: Tensor, weight: Tensor, update: Update
) -> tuple[Tensor, Tensor]:
    """d core (r, r) and W+ in the dtype of x: each block of D and M is formed once and used for both."""
    left, right = _sides(core, update)
    # Row by row, the memory of dW+ becomes that of W+.
    matrix = dy.T @ x
    dD_R = torch.empty_like(left)
    for rows, w, buffer in _blocks(weight, right.dtype):
        d = left[rows] @ right
        M = _limiter(_ratio(w, d, update.eps, out=buffer), ratio_max, update.restraint)
        torch.mm(matrix[rows].to(right.dtype) / M, right.T, out=dD_R[rows])
        _restrain(w, d, M, update.restraint, out=matrix[rows])
    dcore = (update.C.to(left.dtype).T @ dD_R).mul_(update.scaling)
    return dcore.to(core.dtype), matrix


def _sides(core: Tensor, update: Update) -> tuple[Tensor, Tensor]:
    """s C core (out, r) and R (r, in) in the method's dtype; D is their product."""
    dtype = compute_dtype(update.C, core, update.R)
    return (update.C.to(dtype) @ core.to(dtype)).mul_(update.scaling), update.R.to(dtype)


def _ratio(w: Tensor, d: Tensor, eps: float, out: Tensor) -> Tensor:
    """L = |D| / (|W| + eps), in `out`."""
    torch.abs(w, out=out).add_(eps)
    return torch.div(d, out, out=out).abs_().clamp_(max=torch.finfo(d.dtype).max)


def _limiter(L: Tensor, ratio_max: Tensor, restraint: Restraint) -> Tensor:
    """M from L, in its memory. Where D is 0 everywhere, the M that leaves W as it is."""
    scale = restraint.steepness / torch.where(ratio_max > 0, ratio_max, 1.0)
    # 2 - sigmoid(n) = 1 + sigmoid(-n), which is one pass less.
    M = L.mul_(-scale).add_(restraint.steepness / 2).sigmoid_().add_(1.0)
    return M if restraint.form == "update" else torch.where(ratio_max > 0, M, 2.0)


def _restrain(w: Tensor, d: Tensor, M: Tensor, restraint: Restraint, out: Tensor) -> None:
    """Write W+ to `out`, which may be the memory of D. Overwrites D and M."""
    target = out if out.dtype == M.dtype else M
    if restraint.form == "average":
        torch.div(d.add_(w, alpha=2.0), M, out=target)
    else:
        torch.addcdiv(w, d, M, out=target)
    if target is not out:
        out.copy_(target)


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Row blocks of W in `dtype`, each with a buffer of its shape; both are valid until the next block."""
    num_columns = weight.shape[1]
    grid = block_grid(weight.shape[0], num_columns, weight.device.type)
    buffer = torch.empty(grid[0].stop, num_columns, dtype=dtype, device=weight.device)
    widened = None if weight.dtype == dtype else torch.empty_like(buffer)
    for rows in grid:
        height = rows.stop - rows.start
        w = weight[rows] if widened is None else widened[:height].copy_(weight[rows])
        yield rows, w, buffer[:height]


def block_grid(num_rows: int, num_columns: int, device: str) -> list[slice]:
    """The row blocks that W+ is formed in on a kind of device ("cpu", "cuda")."""
    if device == "cpu":
        return list(row_blocks(num_rows, num_columns, _CPU_ELEMENTS))
    height = max(1, _ACCELERATOR_ELEMENTS // num_columns)
    return [slice(at, min(at + height, num_rows)) for at in range(0, num_rows, height)]

"""S-MagNorm: the sigmoid magnitude limit on an update (method.md section 3).

A weight that would change much relative to itself takes its whole update (M near 1), one that would
change little takes about half (M near 2). Shapes: weight, update, ratio and limiter are (out, in), or
any piece of it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from secura_ds.method.cabr import compute_dtype, row_blocks

Form = Literal["update", "average"]

# Below this an absolute eps would let |D| / eps overflow fp32 for ordinary updates.
SMALLEST_EPS = 1e-30


def absolute_mean(weight: Tensor) -> float:
    """mean|W|, summed in double and rounded to fp32, so that the order of adding hardly matters."""
    total = sum(float(weight[rows].detach().double().abs().sum()) for rows in row_blocks(*weight.shape))
    return float(torch.tensor(total / weight.numel(), dtype=torch.float32))


def absolute_eps(
    weight_abs_mean: float | Tensor, eps: float | None, eps_relative: float | None
) -> float | Tensor:
    """The absolute eps of one weight: `eps` itself, or `eps_relative` times `weight_abs_mean`.

    `weight_abs_mean` is read only for `eps_relative`; an all-zero weight gets the smallest usable eps.

    Raises:
        ValueError: both or neither are set, or the one that is set is too small.
    """
    if (eps is None) == (eps_relative is None):
        raise ValueError(f"eps is {eps} and eps_relative is {eps_relative}: exactly one must be set")
    if eps_relative is None:
        assert eps is not None
        if not eps >= SMALLEST_EPS:
            raise ValueError(f"eps is {eps}: at least {SMALLEST_EPS}")
        return eps
    if not eps_relative > 0:
        raise ValueError(f"eps_relative is {eps_relative}: must be above 0")
    relative = eps_relative * weight_abs_mean
    return relative.clamp(min=SMALLEST_EPS) if isinstance(relative, Tensor) else max(relative, SMALLEST_EPS)


def ratio(weight: Tensor, update: Tensor, eps_abs: float | Tensor, *, out: Tensor | None = None) -> Tensor:
    """The ratio loss matrix L = |D| / (|W| + eps) in fp32; overflow is held at the largest finite value.

    Args:
        out: memory for the result, of the same shape and apart from `weight` and `update`.
    """
    dtype = compute_dtype(weight, update)
    L = torch.abs(weight.to(dtype), out=out).add_(eps_abs)
    return torch.div(update.to(dtype), L, out=L).abs_().clamp_(max=torch.finfo(dtype).max)


def limiter(
    ratio: Tensor, ratio_max: float | Tensor, steepness: float, *, out: Tensor | None = None
) -> Tensor:
    """M = 2 - sigmoid(k (L / max L - 1/2)), falling in L, between 1 and 2 (strictly, for k below 32).

    `ratio_max` 0 counts as L = 0 everywhere. `out` may be `ratio` itself.
    """
    largest = torch.as_tensor(ratio_max, dtype=ratio.dtype, device=ratio.device)
    scale = steepness / torch.where(largest > 0, largest, 1.0)
    N = torch.mul(ratio, scale, out=out).sub_(steepness / 2)
    # 2 - sigmoid(N) = 1 + 1 / (1 + exp(N)). On CPUs torch.sigmoid (and exp2) rounds the tail of a vectorised
    # loop differently from its body, so its bits depend on how a matrix is cut; exp's do not.
    return N.exp_().add_(1.0).reciprocal_().add_(1.0)


def restrain(
    weight: Tensor,
    update: Tensor,
    *,
    ratio_max: float | Tensor,
    eps_abs: float | Tensor,
    steepness: float,
    form: Form,
    scratch: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """W+ in fp32 of any piece of W and D, given the maximum of L over the *whole* matrix.

    Element by element, so its bits do not depend on how the matrix is cut. Never waits for the device.

    Args:
        scratch: memory for M, of the same shape and apart from `weight` and `update`.
        out: memory for the result, which may be `update`.

    Raises:
        ValueError: `form` is unknown.
    """
    wide, changed = weight.to(compute_dtype(weight, update)), update.to(compute_dtype(weight, update))
    M = ratio(wide, changed, eps_abs, out=scratch)
    M = limiter(M, ratio_max, steepness, out=M)
    if form == "update":
        return torch.div(changed, M, out=out).add_(wide)
    if form != "average":
        raise ValueError(f"form is {form!r}: allowed are 'update' and 'average'")
    averaged = torch.add(changed, wide, alpha=2.0, out=out).div_(M)
    if isinstance(ratio_max, Tensor):
        return torch.where(ratio_max > 0, averaged, wide)
    return averaged if ratio_max > 0 else wide


@torch.no_grad()
def s_magnorm(
    weight: Tensor,
    update: Tensor,
    *,
    steepness: float = 6.0,
    eps: float | None = 1e-10,
    eps_relative: float | None = None,
    form: Form = "update",
    ratio_max: float | Tensor | None = None,
) -> Tensor:
    """The restrained weight W+ (out, in) in `weight.dtype`, without gradient; W itself if L is 0 everywhere.

    Args:
        weight: W (out, in), any float dtype.
        update: D (out, in).
        steepness: k, how sharply the sigmoid separates small from large ratios.
        eps: absolute eps; pass None with `eps_relative`, which means `eps_relative * mean|W|`.
        form: "update" is W + D / M, "average" is (2 W + D) / M.
        ratio_max: the maximum of L over the whole matrix, if the caller knows it.

    Raises:
        ValueError: shapes differ, `eps` and `eps_relative` are both or neither set, or `form` is unknown.
    """
    if weight.shape != update.shape:
        raise ValueError(
            f"weight is {tuple(weight.shape)} but its update is {tuple(update.shape)}: they must match"
        )
    eps_abs = absolute_eps(absolute_mean(weight) if eps_relative is not None else 0.0, eps, eps_relative)
    if ratio_max is None:
        ratio_max = largest_ratio(weight, update, eps_abs)
    if float(ratio_max) == 0:
        return weight.clone()
    restrained = torch.empty_like(weight)
    for rows in row_blocks(*weight.shape):
        piece = restrain(
            weight[rows],
            update[rows],
            ratio_max=ratio_max,
            eps_abs=eps_abs,
            steepness=steepness,
            form=form,
        )
        restrained[rows] = piece
    return restrained


def largest_ratio(weight: Tensor, update: Tensor, eps_abs: float | Tensor) -> Tensor:
    """max L over the whole matrix as a 0-d tensor, in row blocks."""
    maxima = [ratio(weight[rows], update[rows], eps_abs).amax() for rows in row_blocks(*weight.shape)]
    return torch.stack(maxima).amax()

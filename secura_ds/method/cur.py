"""Choosing the rows and columns of a CUR decomposition by inverted importance (method.md section 1).

Shapes: weight (out, in); rows and columns are (rank,) int64 on the weight's device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secura_ds.method.cabr import row_blocks

# Stands for the infinite inverted importance of a zero norm: any other fp32 norm is far above it.
_SMALLEST_SQUARE = 1e-300


def squared_norms(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Squared L2 norms of the rows (out,) and columns (in,) of `weight` (out, in), in fp32.

    Summed in double and rounded once to fp32, so that devices that add in another order still agree.

    Raises:
        ValueError: the weight holds a NaN.
    """
    num_rows, num_columns = weight.shape
    row_sq = weight.new_empty(num_rows, dtype=torch.float64)
    column_sq = weight.new_zeros(num_columns, dtype=torch.float64)
    for rows in row_blocks(num_rows, num_columns):
        squares = weight[rows].detach().double().square()
        row_sq[rows] = squares.sum(dim=1)
        column_sq += squares.sum(dim=0)
    if bool(row_sq.isnan().any()):
        raise ValueError(f"the weight {tuple(weight.shape)} holds values that are not numbers")
    return row_sq.float(), column_sq.float()


def check_rank(rank: int, num_rows: int, num_columns: int) -> None:
    """Raise ValueError unless `rank` rows and columns can be taken from a (num_rows, num_columns) weight."""
    bound = min(num_rows, num_columns)
    if not 1 <= rank <= bound:
        raise ValueError(
            f"rank is {rank}, but the weight is ({num_rows}, {num_columns}): at least 1, at most {bound}"
        )


def least_important_from_norms(row_sq: Tensor, column_sq: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` rows and columns of least norm, least first; ties go to the lower index.

    Args:
        row_sq: squared norms of the rows, (out,).
        column_sq: squared norms of the columns, (in,).

    Raises:
        ValueError: `rank` is out of bounds, or the chosen rows or columns are all zero.
    """
    check_rank(rank, len(row_sq), len(column_sq))
    # A slice would keep the whole order alive, for every layer.
    rows = torch.argsort(row_sq, stable=True)[:rank].clone()
    columns = torch.argsort(column_sq, stable=True)[:rank].clone()
    _refuse_zero(row_sq[rows], column_sq[columns], (len(row_sq), len(column_sq)))
    return rows, columns


def least_important(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of largest inverted importance: those of least L2 norm.

    Raises:
        ValueError: `rank` is out of bounds, or the chosen rows or columns are all zero.
    """
    return least_important_from_norms(*squared_norms(weight), rank)


def sampled(weight: Tensor, rank: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Rows and columns drawn without replacement with probability proportional to 1 / squared norm (CURLoRA).

    In the order of the draws, which depend on `seed` and the norms only, not on the device.

    Raises:
        ValueError: `rank` is out of bounds, or the chosen rows or columns are all zero.
    """
    row_sq, column_sq = squared_norms(weight)
    check_rank(rank, *weight.shape)
    generator = torch.Generator().manual_seed(seed)
    rows = _draw(row_sq, rank, generator)
    columns = _draw(column_sq, rank, generator)
    _refuse_zero(row_sq[rows], column_sq[columns], tuple(weight.shape))
    return rows, columns


def _draw(norm_sq: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Gumbel top-k: the same law as drawing one by one, in one sort."""
    log_inverted = -norm_sq.cpu().double().clamp(min=_SMALLEST_SQUARE).log()
    uniform = torch.rand(len(norm_sq), generator=generator, dtype=torch.float64)
    keys = log_inverted - (-uniform.log()).log()
    return torch.argsort(keys, descending=True, stable=True)[:rank].clone().to(norm_sq.device)


def _refuse_zero(row_sq: Tensor, column_sq: Tensor, shape: tuple[int, ...]) -> None:
    for kind, norm_sq in (("rows", row_sq), ("columns", column_sq)):
        if not bool((norm_sq > 0).any()):
            raise ValueError(
                f"the {len(norm_sq)} least important {kind} of the {shape} weight are all zero, so it could "
                "never learn: raise the rank or leave this layer out"
            )

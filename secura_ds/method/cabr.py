"""The CABR update D = s C (U + A B) R, formed in row blocks (method.md, notation and section 2).

Shapes: weight (out, in), C (out, r), R (r, in), A (r, m), B (m, r), U (r, r).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Init = Literal["block", "orthogonal", "orthonormal"]

# Large enough for matrix products at full speed, small enough for a few blocks to stay in a CPU's cache.
BLOCK_ELEMENTS = 2**20
# Accelerators want few large kernels.
ACCELERATOR_BLOCK_ELEMENTS = 2**22


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype the method computes in: float64 if any tensor has it, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def block_elements(device: torch.device) -> int:
    """The most elements of a block of D where it is formed for folds."""
    return BLOCK_ELEMENTS if device.type == "cpu" else ACCELERATOR_BLOCK_ELEMENTS


def block_height(num_columns: int, elements: int) -> int:
    """Rows of a block of at most that many elements: a power of two, at least 1."""
    return 1 << max(0, (elements // num_columns).bit_length() - 1)


def row_blocks(num_rows: int, num_columns: int, elements: int | None = None) -> Iterator[slice]:
    """The absolute row grid of a (num_rows, num_columns) matrix: blocks of at most `elements` elements.

    The height depends on `num_columns` and `elements` (by default those of a CPU) only. Whoever computes
    whole blocks of D on the same grid gets the same bits, because the matrix products see the same shapes.
    """
    height = block_height(num_columns, elements or BLOCK_ELEMENTS)
    for start in range(0, num_rows, height):
        yield slice(start, min(start + height, num_rows))


def initial_a(weight: Tensor, cur_rank: int, inner_rank: int, init: Init, *, seed: int = 0) -> Tensor:
    """A (r, m) in fp32: the block `W[:r, :m]`, orthogonal with that block's root mean square, or orthonormal.

    The last has `|A|^2 = r` for every m: a first step of B then moves A B by as much (docs/calibration.md).
    No SVD: the product of truncated factors that the paper forms *is* this block.

    Raises:
        ValueError: `cur_rank > min(out, in)`, `inner_rank > in` for `init="block"`, an unknown `init`,
            or a block of zeros, from which nothing could be learnt.
    """
    num_rows, num_columns = weight.shape
    if not 1 <= cur_rank <= min(num_rows, num_columns):
        raise ValueError(
            f"cur_rank is {cur_rank}, but the weight is ({num_rows}, {num_columns}): at least 1, "
            f"at most {min(num_rows, num_columns)}"
        )
    if inner_rank < 1 or (init == "block" and inner_rank > num_columns):
        raise ValueError(
            f"inner_rank is {inner_rank}, but the weight is ({num_rows}, {num_columns}): at least 1, at most "
            f"{num_columns} for init 'block' (the other inits have no upper bound)"
        )
    if init == "orthonormal":
        scale = math.sqrt(max(1.0, cur_rank / inner_rank))
        return (scale * _orthogonal(cur_rank, inner_rank, seed)).to(weight.device)
    block = weight[:cur_rank, :inner_rank].detach().to(compute_dtype(weight))
    if init == "block":
        if not bool(block.any()):
            raise ValueError(
                f"the corner ({cur_rank}, {inner_rank}) of the ({num_rows}, {num_columns}) weight is all "
                "zero, so A could never learn: use init 'orthogonal'"
            )
        return block.float().clone()
    if init != "orthogonal":
        raise ValueError(f"init is {init!r}: allowed are 'block', 'orthogonal' and 'orthonormal'")
    scale = _root_mean_square(block) or _root_mean_square(weight.detach().to(compute_dtype(weight)))
    A = _orthogonal(cur_rank, inner_rank, seed)
    return (A * (scale / _root_mean_square(A))).to(weight.device)


def _orthogonal(num_rows: int, num_columns: int, seed: int) -> Tensor:
    """Orthonormal rows, or columns if there are fewer of them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.init.orthogonal_(torch.empty(num_rows, num_columns), generator=generator)


def _root_mean_square(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix)) / math.sqrt(matrix.numel())


def core(A: Tensor, B: Tensor, U: Tensor) -> Tensor:
    """U + A B, (r, r) in fp32, outside any autocast region. Differentiable."""
    dtype = compute_dtype(A, B, U)
    with torch.autocast(A.device.type, enabled=False):
        return torch.addmm(U.to(dtype), A.to(dtype), B.to(dtype))


def update_block(
    C: Tensor, core: Tensor, R: Tensor, scaling: float, rows: slice, *, out: Tensor | None = None
) -> Tensor:
    """Rows `rows` of D, (len(rows), in) in fp32. Bit-equal for everyone only on the grid of `row_blocks`.

    Args:
        out: memory for the result. Whoever asks for many blocks should give R in fp32, to convert it once.
    """
    dtype = compute_dtype(C, core, R)
    with torch.autocast(C.device.type, enabled=False):
        left = (C[rows].to(dtype) @ core.to(dtype)) * scaling
        return torch.mm(left, R.to(dtype), out=out)


def update(C: Tensor, core: Tensor, R: Tensor, scaling: float) -> Tensor:
    """The whole D, (out, in) in fp32, from the blocks of `row_blocks`."""
    blocks = row_blocks(len(C), R.shape[1], block_elements(C.device))
    return torch.cat([update_block(C, core, R, scaling, rows) for rows in blocks])

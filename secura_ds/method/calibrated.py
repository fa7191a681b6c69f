"""R from what excites a layer: the second moment S = E[x x^T] (in, in) of its inputs (method.md section 7).

Shapes: weight (out, in), R (r, in) in fp32. Related: LoRA-Null (arXiv 2503.02659), CorDA and OSF. Mode
"contrast", which looks at gradients and at the task as well, is in `contrast`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from secura_ds.method.cabr import compute_dtype, row_blocks
from secura_ds.method.cur import check_rank, least_important

Mode = Literal["null", "rows", "project", "whiten"]

# Share of the mean eigenvalue that keeps whitening from amplifying directions that were hardly sampled.
_WHITEN_FLOOR = 0.01


class Spectrum(NamedTuple):
    """Eigenvalues (in,) of a second moment, least first and at least 0; eigenvectors (in, in), in columns."""

    values: Tensor
    vectors: Tensor


def decompose(second_moment: Tensor) -> Spectrum:
    """Eigen-decomposition of S; each eigenvector's largest entry (the first of equals) is positive.

    Raises:
        ValueError: S is not square, not finite, or all zero.
    """
    check_moment(second_moment)
    values, vectors = torch.linalg.eigh(second_moment.to(compute_dtype(second_moment)))
    peaks = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return Spectrum(values.clamp_(min=0), vectors.mul_(torch.where(peaks < 0, -1.0, 1.0)))


def check_moment(second_moment: Tensor) -> None:
    """Raise ValueError unless a second moment is square, finite and not all zero."""
    if second_moment.ndim != 2 or second_moment.shape[0] != second_moment.shape[1]:
        raise ValueError(f"the second moment is {tuple(second_moment.shape)}: it must be square")
    check_values(second_moment)


def check_values(*moments: Tensor) -> None:
    """Raise ValueError unless second moments, or the rows that they are of, are finite and not all zero."""
    for moment in moments:
        if not bool(torch.isfinite(moment).all()):
            raise ValueError(f"the second moment {tuple(moment.shape)} holds values that are not finite")
        if not bool(moment.any()):
            raise ValueError(f"the second moment {tuple(moment.shape)} is all zero: the layer had no input")


def mean_row_norm(weight: Tensor) -> float:
    """Mean L2 norm of the rows of `weight`."""
    total = sum(
        float(torch.linalg.vector_norm(weight[rows].detach().to(compute_dtype(weight)), dim=1).sum())
        for rows in row_blocks(*weight.shape)
    )
    return total / len(weight)


def least_response_rows(weight: Tensor, second_moment: Tensor, rank: int) -> Tensor:
    """Indices (rank,) of the rows w with least w S w^T / ||w||^2, least first; zero rows come last.

    Raises:
        ValueError: `rank` is out of bounds.
    """
    check_rank(rank, *weight.shape)
    dtype = compute_dtype(weight, second_moment)
    moment, responses = second_moment.to(dtype), []
    for rows in row_blocks(*weight.shape):
        block = weight[rows].detach().to(dtype)
        energy, norm_sq = (block @ moment).mul_(block).sum(dim=1), block.square().sum(dim=1)
        responses.append(torch.where(norm_sq > 0, energy / norm_sq, torch.inf))
    return torch.argsort(torch.cat(responses), stable=True)[:rank]


def null_space(spectrum: Spectrum, rank: int) -> Tensor:
    """The `rank` eigenvectors of least eigenvalue as unit rows, (rank, in)."""
    return spectrum.vectors[:, :rank].T.contiguous()


def project_out(rows: Tensor, spectrum: Spectrum, energy: float) -> Tensor:
    """`rows` (r, in) without their part in the fewest leading eigenvectors that hold `energy` of the trace.

    Raises:
        ValueError: `energy` is not between 0 and 1.
    """
    if not 0 < energy < 1:
        raise ValueError(f"energy is {energy}: it must lie between 0 and 1")
    held = spectrum.values.flip(0).cumsum(0)
    leading = int((held < energy * held[-1]).sum()) + 1
    V = spectrum.vectors[:, len(held) - leading :]
    return rows - (rows @ V) @ V.T


def whiten(rows: Tensor, spectrum: Spectrum) -> Tensor:
    """`rows` (r, in) times (S + 0.01 mean(eig) 1)^(-1/2)."""
    floor = _WHITEN_FLOOR * spectrum.values.mean()
    V = spectrum.vectors
    return ((rows @ V) * (spectrum.values + floor).rsqrt()) @ V.T


def factors(
    weight: Tensor,
    second_moment: Tensor,
    rank: int,
    *,
    mode: Mode,
    energy: float = 0.9,
    spectrum: Spectrum | None = None,
) -> Tensor:
    """R (rank, in) in fp32 for one layer.

    Args:
        weight: W (out, in), any float dtype.
        second_moment: S (in, in).
        mode: "null": eigenvectors of least eigenvalue, each with the mean row norm of W; "rows": rows of W of
            least normalised response (`least_response_rows` gives their indices); "project": least-norm rows
            without the leading `energy` of S; "whiten": least-norm rows whitened by S, of W's mean row norm.
        spectrum: `decompose(second_moment)`, if layers share it.

    Raises:
        ValueError: `rank` is out of bounds, shapes do not fit, the mode is unknown, or R came out all zero.
    """
    check_rank(rank, *weight.shape)
    if second_moment.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"the second moment is {tuple(second_moment.shape)}, but the weight is {tuple(weight.shape)}: "
            f"it must be ({weight.shape[1]}, {weight.shape[1]})"
        )
    if mode == "rows":
        R = weight[least_response_rows(weight, second_moment, rank)].detach().float()
    elif mode in ("null", "project", "whiten"):
        spectrum = spectrum or decompose(second_moment)
        R = _from_spectrum(weight, spectrum, rank, mode, energy).float()
    else:
        raise ValueError(f"mode is {mode!r}: allowed are 'null', 'rows', 'project' and 'whiten'")
    if not bool(R.any()):
        raise ValueError(
            f"R ({rank}, {weight.shape[1]}) of the {tuple(weight.shape)} weight is all zero in {mode!r}: "
            "it could never learn, leave this layer out"
        )
    return R


def _from_spectrum(weight: Tensor, spectrum: Spectrum, rank: int, mode: str, energy: float) -> Tensor:
    if mode == "null":
        return null_space(spectrum, rank) * mean_row_norm(weight)
    rows = weight[least_important(weight, rank)[0]].detach().to(spectrum.vectors.dtype)
    if mode == "project":
        return project_out(rows, spectrum, energy)
    whitened = whiten(rows, spectrum)
    return whitened * (mean_row_norm(weight) / mean_row_norm(whitened))

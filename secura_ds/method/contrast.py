"""Factors of mode "contrast": directions in which the task asks most for each unit of what general text asks.

With S = E[x x^T] (in, in) of a layer's inputs and F = E[g g^T] (out, out) of the loss's gradients by its
output, and input and gradient taken as independent (K-FAC, arXiv 1503.05671), an update D changes the loss of
general text by tr(F D S D^T) / 2 a token, to second order. R comes from S of general text and of the task, C
from F of both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secura_ds.method.cabr import compute_dtype
from secura_ds.method.calibrated import check_moment, check_values, decompose
from secura_ds.method.cur import check_rank

# Root of the loss, in nats a token times two, that all layers' updates of norm 1 cost together. It only sets
# the unit of learning rates: with it they lie where those of LoRA do.
_SCALE = 10.0
# Share of the largest ratio below which rows cannot tell one: what is left is rounding.
_SMALLEST_RATIO = 1e-8


def contrast(task: Tensor, general: Tensor, rank: int, floor: float = 0.03) -> Tensor:
    """The `rank` directions of largest (x^T task x) / (x^T general x), in columns: X (n, rank) in fp32.

    Generalised eigenvectors, largest ratio first, with X^T (general + floor) X = 1.

    Args:
        task, general: second moments (n, n) of the same inputs or gradients.
        floor: as a share of general's mean eigenvalue; general text is taken to need every direction that
            much, since what it seldom calls for lies there, too.

    Raises:
        ValueError: `rank` is out of bounds, or a moment is not square, not finite, or all zero.
    """
    check_rank(rank, *general.shape)
    for moment in (task, general):
        check_moment(moment)
    raised = general.to(compute_dtype(general), copy=True)
    raised.diagonal().add_(floor * raised.diagonal().mean())
    L = torch.linalg.cholesky(raised)
    half = torch.linalg.solve_triangular(L, task.to(L.dtype), upper=False)
    ratios = decompose(torch.linalg.solve_triangular(L, half.T, upper=False))
    X = torch.linalg.solve_triangular(L.T, ratios.vectors[:, -rank:].flip(1), upper=True)
    return X.float().contiguous()


def contrast_of_rows(task: Tensor, general: Tensor, rank: int, floor: float = 0.03) -> Tensor:
    """`contrast` of the moments Y^T Y and X^T X, for fewer tokens than n: nothing of size (n, n) is formed.

    With S = X^T X + l 1 the ratios are the eigenvalues of Y S^-1 Y^T (tokens, tokens), and S^-1 Y^T u is the
    direction of an eigenvector u. S^-1 is (1 - X^T (X X^T + l 1)^-1 X) / l (Woodbury). In double throughout,
    as these differences are small beside what they are taken of.

    Args:
        task, general: Y (tokens, n) and X (tokens, n), divided by the root of the number of tokens.

    Raises:
        ValueError: `rank` is out of bounds, or rows are not finite or all zero.
    """
    n = general.shape[1]
    check_rank(rank, n, n)
    check_values(task, general)
    if len(task) < rank:
        return contrast(task.T @ task, general.T @ general, rank, floor)
    Y, X = task.double(), general.double()
    raised = floor * float(X.square().sum()) / n
    inner = X @ X.T
    inner.diagonal().add_(raised)
    L = torch.linalg.cholesky(inner)
    H = torch.linalg.solve_triangular(L, X @ Y.T, upper=False)
    ratios = decompose((Y @ Y.T).sub_(H.T @ H))
    values, U = ratios.values[-rank:].flip(0), ratios.vectors[:, -rank:].flip(1)
    if values[-1] <= _SMALLEST_RATIO * values[0]:
        return contrast(task.T @ task, general.T @ general, rank, floor)
    directions = Y.T @ U - X.T @ torch.linalg.solve_triangular(L.T, H @ U, upper=True)
    return directions.div_((raised * values).sqrt()).float()


def contrast_scale(rank: int, num_layers: int) -> float:
    """Factor of C with which learning rates carry over to other ranks and numbers of layers.

    A step of Adam moves each of the r^2 entries of the core by about the learning rate eta, and the cost of
    C X R, for C and R of `contrast`, is ||X||^2 / 2 a layer: r^2 eta^2 / 2 in each of `num_layers`.
    """
    return _SCALE / (rank * math.sqrt(num_layers))

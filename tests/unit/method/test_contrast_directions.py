"""Directions of largest ratio, from moments and from rows."""

from __future__ import annotations

import pytest
import torch
from calibration_toys import assert_same_directions
from torch import Tensor

from secura_ds.method.contrast import contrast, contrast_of_rows, contrast_scale


def moment(seed: int, n: int = 12, samples: int = 40) -> Tensor:
    x = torch.randn(samples, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / samples


def test_directions_are_generalised_eigenvectors_of_largest_ratio() -> None:
    task, general = moment(1), moment(2)
    X = contrast(task, general, 5).double()
    floored = general + 0.03 * torch.linalg.eigvalsh(general).mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(X.T @ floored @ X, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-5)
    ratios = torch.linalg.eigvals(torch.linalg.solve(floored, task)).real.sort(descending=True).values
    torch.testing.assert_close((X.T @ task @ X).diag(), ratios[:5], rtol=1e-5, atol=0)
    assert torch.equal(contrast(task, general, 12)[:, :5], X.float())


def test_the_directions_cost_what_they_are_said_to() -> None:
    """tr(F D S D^T) of D = C X R is ||X||^2, which the scale makes the same for other ranks and depths."""
    S, output = moment(1), moment(2, n=9)
    R, C = contrast(moment(3), S, 6).double().T, contrast(moment(4, n=9), output, 6).double()
    X = torch.randn(6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    D = C @ X @ R
    cost = float(torch.trace(output @ D @ S @ D.T))
    assert cost == pytest.approx(float(X.square().sum()), rel=0.5)
    assert cost < float(X.square().sum())  # the floor makes directions cost less than it says
    wide, deep = contrast_scale(8, 4), contrast_scale(4, 16)
    assert wide * 8 * 4**0.5 == pytest.approx(deep * 4 * 16**0.5)


@pytest.mark.parametrize(
    ("task", "general", "message"),
    [
        (torch.eye(3), torch.zeros(3, 3), "all zero"),
        (torch.zeros(3, 3), torch.eye(3), "all zero"),
        (torch.eye(3), torch.full((3, 3), torch.nan), "not finite"),
        (torch.eye(3), torch.eye(3)[:2], "square"),
    ],
)
def test_moments_that_say_nothing_are_refused(task: Tensor, general: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contrast(task, general, 2)


def vectors(seed: int, samples: int, n: int = 60) -> Tensor:
    """Rows of a moment (n, n), of energies over seven orders of magnitude."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    energies = torch.logspace(0, -3.5, n, dtype=torch.float64)[torch.randperm(n, generator=g)]
    x = torch.randn(samples, n, generator=g, dtype=torch.float64)
    return x * energies @ mixing / samples**0.5


@pytest.mark.parametrize(("floor", "samples"), [(0.03, 25), (0.0001, 25), (0.03, 8), (1.0, 40)])
def test_rows_give_the_directions_of_their_moments(floor: float, samples: int) -> None:
    Y, X = vectors(1, samples), vectors(2, 30)
    expected = contrast(Y.T @ Y, X.T @ X, 8, floor)
    assert_same_directions(contrast_of_rows(Y, X, 8, floor), expected, tolerance=1e-6)


def test_rows_that_are_too_few_or_alike_give_what_their_moments_give() -> None:
    X = vectors(2, 30)
    for Y in (vectors(1, 5), vectors(1, 5).repeat(4, 1)):
        assert torch.equal(contrast_of_rows(Y, X, 8), contrast(Y.T @ Y, X.T @ X, 8))
    for Y, message in ((torch.zeros(9, 60), "all zero"), (torch.full((9, 60), torch.inf), "not finite")):
        for given in ((Y, X), (X, Y)):
            with pytest.raises(ValueError, match=message):
                contrast_of_rows(*given, 8)
    with pytest.raises(ValueError, match="rank is 61"):
        contrast_of_rows(X, X, 61)

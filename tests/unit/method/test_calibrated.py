from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secura_ds.method.calibrated import (
    decompose,
    factors,
    least_response_rows,
    mean_row_norm,
    null_space,
    project_out,
    whiten,
)
from secura_ds.method.cur import least_important

MODES = ["null", "rows", "project", "whiten"]


def _layer(seed: int = 0, out: int = 24, width: int = 16) -> tuple[Tensor, Tensor]:
    """A weight and the second moment of inputs whose directions differ much in energy."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=g)
    mixing = torch.linalg.qr(torch.randn(width, width, generator=g))[0]
    x = torch.randn(400, width, generator=g) @ (torch.logspace(0, -3, width)[:, None] * mixing)
    return weight, x.T @ x / len(x)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 16), st.sampled_from([torch.float32, torch.bfloat16]))
def test_null_takes_the_directions_of_least_energy(seed: int, rank: int, dtype: torch.dtype) -> None:
    weight, S = _layer(seed)
    weight = weight.to(dtype)
    R = factors(weight, S, rank, mode="null")
    assert R.dtype == torch.float32
    norm = weight.double().norm(dim=1).mean()
    torch.testing.assert_close(R.norm(dim=1).double(), norm.expand(rank), rtol=1e-5, atol=0)
    torch.testing.assert_close(R @ R.T, float(norm) ** 2 * torch.eye(rank), rtol=0, atol=1e-4)
    energy = torch.trace(R @ S @ R.T) / norm**2
    least = torch.linalg.eigvalsh(S.double())[:rank].sum()
    assert float(energy) == pytest.approx(float(least), rel=1e-3, abs=1e-6)


def test_rows_are_rows_of_the_weight_with_least_normalised_response() -> None:
    weight, S = _layer(1)
    weight[5] = 0
    w, s = weight.double(), S.double()
    response = torch.einsum("oi,ij,oj->o", w, s, w) / w.square().sum(1)
    expected = response.nan_to_num(nan=torch.inf).argsort()[:6]
    chosen = least_response_rows(weight, S, 6)
    assert chosen.tolist() == expected.tolist()
    assert torch.equal(factors(weight, S, 6, mode="rows"), weight[chosen])
    assert least_response_rows(weight, S, 16).tolist().count(5) == 0


def test_rows_of_a_weight_of_many_blocks() -> None:
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(1200, 512, generator=g), torch.randn(600, 512, generator=g)
    S = x.T @ x / 600
    response = ((weight @ S) * weight).sum(1) / weight.square().sum(1)
    torch.testing.assert_close(
        response[least_response_rows(weight, S, 32)], response.sort().values[:32], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_project_removes_the_fewest_leading_directions_that_hold_the_energy(energy: float) -> None:
    weight, S = _layer(2)
    values, vectors = torch.linalg.eigh(S.double())
    share = values.flip(0).cumsum(0) / values.sum()
    leading = next(i for i, held in enumerate(share.tolist(), start=1) if held >= energy)
    V = vectors[:, -leading:]
    rows = weight[least_important(weight, 5)[0]].double()
    R = factors(weight, S, 5, mode="project", energy=energy).double()
    torch.testing.assert_close(R, rows - rows @ V @ V.T, rtol=0, atol=1e-5)
    assert float((R @ V).abs().max()) < 1e-5


def test_whiten_multiplies_by_the_inverse_root_and_keeps_the_mean_row_norm() -> None:
    weight, S = _layer(3)
    values, vectors = torch.linalg.eigh(S.double())
    root = vectors @ torch.diag((values + 0.01 * values.mean()).rsqrt()) @ vectors.T
    expected = weight[least_important(weight, 5)[0]].double() @ root
    expected *= weight.double().norm(dim=1).mean() / expected.norm(dim=1).mean()
    R = factors(weight, S, 5, mode="whiten")
    torch.testing.assert_close(R.double(), expected, rtol=1e-4, atol=1e-4)
    assert mean_row_norm(R) == pytest.approx(mean_row_norm(weight), rel=1e-5)


def test_signs_of_eigenvectors_are_fixed() -> None:
    _, S = _layer(4)
    vectors = decompose(S).vectors
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()
    # A negated basis (another LAPACK, another device) leads to the same vectors.
    flip = torch.diag(torch.tensor([1.0, -1.0] * 8))
    mirrored = decompose(flip @ S @ flip).vectors
    torch.testing.assert_close((flip @ mirrored).abs(), vectors.abs(), rtol=0, atol=1e-3)


def test_a_shared_spectrum_gives_the_same_factors() -> None:
    weight, S = _layer(5)
    spectrum = decompose(S)
    for mode in ("null", "project", "whiten"):
        alone = factors(weight, S, 4, mode=mode)
        shared = factors(weight, S, 4, mode=mode, spectrum=spectrum)
        assert torch.equal(alone, shared)
    assert torch.equal(null_space(spectrum, 4), spectrum.vectors[:, :4].T)
    rows = torch.randn(3, 16)
    assert project_out(rows, spectrum, 0.9).shape == whiten(rows, spectrum).shape == (3, 16)


@pytest.mark.parametrize("mode", MODES)
def test_full_rank_and_rank_deficient_moments(mode: str) -> None:
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 10, generator=g), torch.randn(4, 10, generator=g)
    R = factors(weight, x.T @ x / 4, 6, mode=mode, energy=0.5)  # type: ignore[arg-type]
    assert R.shape == (6, 10)
    assert torch.isfinite(R).all()
    if mode == "null":
        assert float((x @ R.T).abs().max()) < 1e-5


def test_what_cannot_work_is_refused() -> None:
    weight, S = _layer()
    with pytest.raises(ValueError, match=r"rank is 17, but the weight is \(24, 16\): .* at most 16"):
        factors(weight, S, 17, mode="null")
    with pytest.raises(ValueError, match=r"second moment is \(8, 8\).* must be \(16, 16\)"):
        factors(weight, S[:8, :8], 4, mode="null")
    with pytest.raises(ValueError, match="must be square"):
        decompose(S[:8])
    with pytest.raises(ValueError, match="'nul'"):
        factors(weight, S, 4, mode="nul")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="energy is 1.0"):
        factors(weight, S, 4, mode="project", energy=1.0)
    with pytest.raises(ValueError, match="had no input"):
        factors(weight, torch.zeros_like(S), 4, mode="null")
    with pytest.raises(ValueError, match="not finite"):
        factors(weight, S * torch.inf, 4, mode="null")
    with pytest.raises(ValueError, match=r"\(4, 16\) of the \(24, 16\) weight is all zero in 'rows'"):
        factors(torch.zeros_like(weight), S, 4, mode="rows")
    with pytest.raises(ValueError, match="least important rows"):
        factors(torch.zeros_like(weight), S, 4, mode="whiten")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_arguments_are_left_as_they_are(dtype: torch.dtype) -> None:
    weight, S = (t.to(dtype) for t in _layer(6))
    before = weight.clone(), S.clone()
    for mode in MODES:
        factors(weight, S, 4, mode=mode)  # type: ignore[arg-type]
    assert torch.equal(weight, before[0])
    assert torch.equal(S, before[1])

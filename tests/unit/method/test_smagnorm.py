from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secura_ds.method.cabr import row_blocks
from secura_ds.method.smagnorm import absolute_eps, absolute_mean, limiter, ratio, restrain, s_magnorm

FORMS = ["update", "average"]
EPS = [{"eps": 1e-10}, {"eps": None, "eps_relative": 1.0}]


def _statement(W: Tensor, D: Tensor, *, k: float, eps: float, form: str) -> tuple[Tensor, Tensor]:
    """method.md section 3 in float64, word for word. Returns W+ and M."""
    W, D = W.double(), D.double()
    if not D.any():
        return W, torch.ones_like(W)
    L = D.abs() / (W.abs() + eps)
    N = k * (L / L.max() - 0.5)
    M = 2 - torch.sigmoid(N)
    return (W + D / M if form == "update" else (2 * W + D) / M), M


def _pair(seed: int, shape: tuple[int, int] = (13, 17), scale: float = 1e-2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g), scale * torch.randn(shape, generator=g)


seeds = st.integers(0, 10**6)
scales = st.floats(-6, 3).map(lambda x: 10.0**x)
steepnesses = st.floats(0.5, 30)


@settings(max_examples=60, deadline=None)
@given(seeds, scales, steepnesses, st.sampled_from(FORMS), st.sampled_from([1e-10, 1e-3, 1.0]))
def test_agrees_with_the_float64_statement(seed: int, scale: float, k: float, form: Any, eps: float) -> None:
    W, D = _pair(seed, scale=scale)
    expected, _ = _statement(W, D, k=k, eps=eps, form=form)
    restrained = s_magnorm(W, D, steepness=k, eps=eps, form=form)
    tolerance = 1e-6 * (W.abs() + D.abs()).double()
    assert ((restrained.double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("form", FORMS)
def test_relative_eps_is_a_share_of_the_mean_weight(form: Any) -> None:
    W, D = _pair(0)
    expected, _ = _statement(W, D, k=6, eps=0.3 * float(W.double().abs().mean()), form=form)
    restrained = s_magnorm(W, D, eps=None, eps_relative=0.3, form=form)
    torch.testing.assert_close(restrained.double(), expected, rtol=1e-6, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from(FORMS), st.sampled_from(EPS), st.sampled_from([torch.float32, torch.bfloat16]))
def test_identity_at_zero(seed: int, form: Any, eps: dict[str, Any], dtype: torch.dtype) -> None:
    W = _pair(seed)[0].to(dtype)
    restrained = s_magnorm(W, torch.zeros_like(W), form=form, **eps)
    assert restrained.dtype == dtype
    assert torch.equal(restrained, W)
    assert restrained.data_ptr() != W.data_ptr()


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from(EPS), st.floats(0.5, 12))
def test_update_form_is_continuous_at_zero(seed: int, eps: dict[str, Any], k: float) -> None:
    W, D = (t.double() for t in _pair(seed))
    for t in (1e-2, 1e-5, 1e-9, 1e-14):
        step = (s_magnorm(W, t * D, steepness=k, **eps) - W).abs()
        assert (step <= t * D.abs() + 1e-15).all()


def test_average_form_jumps_at_zero_by_the_stated_amount() -> None:
    W, D = _pair(3, (60, 80))
    factor = 2 / (2 - torch.sigmoid(torch.tensor(-3.0)))
    assert abs(float(factor) - 1.0243) < 1e-3
    small = s_magnorm(W, 1e-9 * D, form="average")
    # Where the ratio is far below its maximum, W+ / W is that factor however small the update is.
    quiet = ratio(W, D, 1e-10) < 1e-3 * ratio(W, D, 1e-10).max()
    assert quiet.sum() > 20
    torch.testing.assert_close(small[quiet], factor * W[quiet], rtol=1e-3, atol=0)


@settings(max_examples=60, deadline=None)
@given(seeds, scales, steepnesses)
def test_limiter_lies_strictly_between_one_and_two_and_falls_with_the_ratio(
    seed: int, scale: float, k: float
) -> None:
    L = ratio(*_pair(seed, scale=scale), 1e-10)
    M = limiter(L, L.max(), k)
    assert (M > 1).all()
    assert (M < 2).all()
    order = L.flatten().argsort()
    assert (M.flatten()[order].diff() <= 0).all()
    assert torch.equal(M, limiter(L, float(L.max()), k))


@settings(max_examples=60, deadline=None)
@given(seeds, scales, steepnesses)
def test_sign_and_order_of_the_update_are_kept(seed: int, scale: float, k: float) -> None:
    W, D = (t.double() for t in _pair(seed, scale=scale))
    L = ratio(W, D, 1e-10)
    kept = D / limiter(L, L.max(), k)
    assert torch.equal(kept.sign(), D.sign())
    assert (kept.abs() <= D.abs()).all()
    assert (kept.abs() >= D.abs() / 2).all()
    order = L.flatten().argsort()
    relative = (kept.abs() / (W.abs() + 1e-10)).flatten()[order]
    assert (relative.diff() >= -1e-15 * relative[1:]).all()
    restrained = s_magnorm(W, D, steepness=k)
    assert (restrained - W - kept).abs().max() <= 1e-15 * (W.abs() + D.abs()).max()


@settings(max_examples=40, deadline=None)
@given(seeds, st.lists(st.integers(1, 29999), max_size=6), st.sampled_from(FORMS), st.sampled_from(EPS))
def test_any_cut_of_the_matrix_gives_the_same_bits(
    seed: int, cuts: list[int], form: Any, eps: dict[str, Any]
) -> None:
    W, D = _pair(seed, (150, 200))
    whole = s_magnorm(W, D, form=form, **eps).flatten()
    eps_abs = absolute_eps(absolute_mean(W), eps["eps"], eps.get("eps_relative"))
    bounds = [0, *sorted(set(cuts)), W.numel()]
    slices = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    flat_w, flat_d = W.flatten(), D.flatten()
    ratio_max = torch.stack([ratio(flat_w[s], flat_d[s], eps_abs).amax() for s in slices]).amax()
    pieces = [
        restrain(flat_w[s], flat_d[s], ratio_max=ratio_max, eps_abs=eps_abs, steepness=6.0, form=form)
        for s in slices
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_a_matrix_of_several_row_blocks_equals_the_unblocked_formula_bit_for_bit() -> None:
    W, D = _pair(5, (4500, 600))
    assert len(list(row_blocks(4500, 600))) == 5
    L = ratio(W, D, 1e-10)
    assert torch.equal(s_magnorm(W, D), W + D / limiter(L, L.max(), 6.0))


def test_a_known_maximum_is_used() -> None:
    W, D = _pair(6)
    ratio_max = ratio(W, D, 1e-10).max()
    assert torch.equal(s_magnorm(W, D, ratio_max=ratio_max), s_magnorm(W, D))
    assert torch.equal(s_magnorm(W, D, ratio_max=float(ratio_max)), s_magnorm(W, D))
    upper, lower = s_magnorm(W[:5], D[:5], ratio_max=ratio_max), s_magnorm(W[5:], D[5:], ratio_max=ratio_max)
    assert torch.equal(torch.cat([upper, lower]), s_magnorm(W, D))
    assert torch.equal(s_magnorm(W, D, ratio_max=0.0), W)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("eps", EPS)
def test_an_all_zero_weight_takes_its_update(form: Any, eps: dict[str, Any]) -> None:
    W, D = torch.zeros(4, 4), torch.full((4, 4), 0.5)
    M = 2 - torch.sigmoid(torch.tensor(3.0))
    torch.testing.assert_close(s_magnorm(W, D, form=form, **eps), D / M)


@pytest.mark.parametrize("form", FORMS)
def test_one_huge_update_takes_all_the_room(form: Any) -> None:
    W, D = torch.zeros(4, 4), torch.full((4, 4), 1e-3)
    W += 1
    W[2, 2], D[2, 2] = 0.0, 3e38
    restrained = s_magnorm(W, D, form=form)
    assert torch.isfinite(restrained).all()
    least = 2 - torch.sigmoid(torch.tensor(-3.0))
    expected = 1 + 1e-3 / least if form == "update" else (2 + 1e-3) / least
    torch.testing.assert_close(restrained[0, 0], expected)
    torch.testing.assert_close(restrained[2, 2], 3e38 / (2 - torch.sigmoid(torch.tensor(3.0))))


def test_one_huge_weight_leaves_the_others_alone() -> None:
    W, D = _pair(7)
    W[3, 4] = 1e38
    expected, _ = _statement(W, D, k=6, eps=1e-10, form="update")
    torch.testing.assert_close(s_magnorm(W, D).double(), expected, rtol=1e-6, atol=1e-7)


def test_bf16_is_computed_in_fp32_and_rounded_once() -> None:
    W, D = _pair(8)
    W, D = W.bfloat16(), D.bfloat16()
    restrained = s_magnorm(W, D)
    assert restrained.dtype == torch.bfloat16
    assert torch.equal(restrained, s_magnorm(W.float(), D.float()).bfloat16())


def test_no_gradient_is_kept() -> None:
    W, D = _pair(9)
    assert not s_magnorm(W.requires_grad_(), D.requires_grad_()).requires_grad


def test_eps_must_be_set_exactly_once() -> None:
    W, D = _pair(0)
    with pytest.raises(ValueError, match="exactly one"):
        s_magnorm(W, D, eps_relative=1.0)
    with pytest.raises(ValueError, match="exactly one"):
        s_magnorm(W, D, eps=None)
    with pytest.raises(ValueError, match="eps is 0.0: at least 1e-30"):
        s_magnorm(W, D, eps=0.0)
    with pytest.raises(ValueError, match="eps_relative is -1.0"):
        s_magnorm(W, D, eps=None, eps_relative=-1.0)
    mean = torch.tensor([0.0, 2.0])
    torch.testing.assert_close(absolute_eps(mean, None, 0.5), torch.tensor([1e-30, 1.0]))


def test_misfits_are_refused() -> None:
    W, D = _pair(0)
    with pytest.raises(ValueError, match=r"\(13, 17\) but its update is \(13, 16\)"):
        s_magnorm(W, D[:, :-1])
    with pytest.raises(ValueError, match="'mean'"):
        s_magnorm(W, D, form="mean")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_arguments_are_left_as_they_are(dtype: torch.dtype) -> None:
    W, D = (t.to(dtype) for t in _pair(10))
    before = W.clone(), D.clone()
    for form in FORMS:
        for eps in EPS:
            s_magnorm(W, D, form=form, **eps)  # type: ignore[arg-type]
    assert torch.equal(W, before[0])
    assert torch.equal(D, before[1])


def test_absolute_mean_of_many_blocks() -> None:
    W = torch.randn(900, 700, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert absolute_mean(W) == pytest.approx(float(W.double().abs().mean()), rel=1e-7)

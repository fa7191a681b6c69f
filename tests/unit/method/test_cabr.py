from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secura_ds.method import cabr


def _factors(out: int, width: int, r: int, m: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(out * 1000 + width)
    shapes = {"C": (out, r), "R": (r, width), "A": (r, m), "B": (m, r), "U": (r, r)}
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


def test_block_init_is_the_corner_of_the_weight() -> None:
    weight = torch.randn(6, 9).bfloat16()
    A = cabr.initial_a(weight, 4, 7, "block")
    assert A.dtype == torch.float32
    assert torch.equal(A, weight[:4, :7].float())
    before = weight.clone()
    A.zero_()
    assert torch.equal(weight, before)


def test_block_init_copies_an_fp32_weight() -> None:
    weight = torch.ones(4, 4)
    cabr.initial_a(weight, 2, 2, "block").zero_()
    assert torch.equal(weight, torch.ones(4, 4))


def test_block_init_is_the_product_of_truncated_svd_factors() -> None:
    weight = torch.randn(12, 8, dtype=torch.float64)
    P, S, Qt = torch.linalg.svd(weight, full_matrices=False)
    expected = P[:5] @ torch.diag(S) @ Qt[:, :6]
    torch.testing.assert_close(cabr.initial_a(weight, 5, 6, "block").double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("r", "m"), [(4, 7), (5, 5), (6, 2)])
def test_orthogonal_init_has_the_rms_of_the_block(r: int, m: int) -> None:
    weight = 3 * torch.randn(8, 9, generator=torch.Generator().manual_seed(0))
    A = cabr.initial_a(weight, r, m, "orthogonal", seed=2)
    assert A.shape == (r, m)
    gram = A @ A.T if r <= m else A.T @ A
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(min(r, m)), rtol=0, atol=1e-4)
    torch.testing.assert_close(A.square().mean(), weight[:r, :m].square().mean())
    assert torch.equal(A, cabr.initial_a(weight, r, m, "orthogonal", seed=2))
    assert not torch.equal(A, cabr.initial_a(weight, r, m, "orthogonal", seed=3))


@pytest.mark.parametrize("m", [3, 8, 20])
def test_a_step_of_b_moves_the_core_alike_for_every_inner_rank(m: int) -> None:
    """On average over steps of Adam's size in B, |A B|^2 is r^2 times the step's square."""
    r = 8
    A = cabr.initial_a(torch.randn(30, 30), r, m, "orthonormal", seed=1)
    assert float(A.square().sum()) == pytest.approx(r)
    thinner = A @ A.T if m >= r else A.T @ A
    torch.testing.assert_close(thinner, torch.eye(min(r, m)) * (r / min(r, m)), atol=1e-5, rtol=0)
    steps = torch.randn(4000, m, r).sign()
    assert float((A @ steps).square().sum(dim=(1, 2)).mean()) == pytest.approx(r * r, rel=0.02)


def test_orthogonal_init_of_a_zero_corner_takes_the_rms_of_the_weight() -> None:
    weight = torch.ones(8, 8)
    weight[:4, :4] = 0
    with pytest.raises(ValueError, match=r"corner \(4, 4\) of the \(8, 8\) weight is all zero"):
        cabr.initial_a(weight, 4, 4, "block")
    A = cabr.initial_a(weight, 4, 4, "orthogonal")
    torch.testing.assert_close(A.square().mean(), weight.square().mean())


def test_bounds_are_named() -> None:
    weight = torch.ones(4, 9)
    with pytest.raises(ValueError, match=r"cur_rank is 5, but the weight is \(4, 9\): .* at most 4"):
        cabr.initial_a(weight, 5, 6, "block")
    with pytest.raises(ValueError, match=r"inner_rank is 10, but the weight is \(4, 9\): .* at most 9"):
        cabr.initial_a(weight, 4, 10, "block")
    assert cabr.initial_a(weight, 4, 10, "orthogonal").shape == (4, 10)
    with pytest.raises(ValueError, match="'blok'"):
        cabr.initial_a(weight, 4, 6, "blok")  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 2**19))
def test_row_blocks_cover_every_row_once_in_bounded_pieces(num_rows: int, num_columns: int) -> None:
    num_rows = min(num_rows, 5000 * max(1, cabr.BLOCK_ELEMENTS // num_columns))
    blocks = list(cabr.row_blocks(num_rows, num_columns))
    assert blocks[0].start == 0
    assert blocks[-1].stop == num_rows
    assert all(a.stop == b.start for a, b in zip(blocks, blocks[1:], strict=False))
    height = blocks[0].stop - blocks[0].start
    assert height * num_columns <= max(cabr.BLOCK_ELEMENTS, num_columns)
    assert len(blocks) == 1 or 2 * height * num_columns > cabr.BLOCK_ELEMENTS


def test_the_row_grid_does_not_depend_on_the_number_of_rows() -> None:
    short, long = list(cabr.row_blocks(2500, 1024)), list(cabr.row_blocks(7000, 1024))
    assert short[0] == slice(0, 1024)
    assert short[:-1] == long[: len(short) - 1]


def test_update_follows_its_formula_in_fp32() -> None:
    f = _factors(50, 40, 6, 9, torch.bfloat16)
    U = f["U"].float()
    core = cabr.core(f["A"], f["B"], U)
    assert core.dtype == torch.float32
    d = {name: t.double() for name, t in f.items()}
    expected = 0.7 * d["C"] @ (U.double() + d["A"] @ d["B"]) @ d["R"]
    D = cabr.update(f["C"], core, f["R"], 0.7)
    assert D.dtype == torch.float32
    torch.testing.assert_close(D.double(), expected, rtol=1e-5, atol=1e-3)


def test_update_is_computed_in_fp32_inside_autocast() -> None:
    f = _factors(50, 40, 6, 9)
    expected = cabr.update(f["C"], cabr.core(f["A"], f["B"], f["U"]), f["R"], 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = cabr.update(f["C"], cabr.core(f["A"], f["B"], f["U"]), f["R"], 1.0)
    assert torch.equal(inside, expected)


def test_whole_update_is_its_blocks_bit_for_bit() -> None:
    f = _factors(5500, 600, 16, 24)
    core = cabr.core(f["A"], f["B"], f["U"])
    whole = cabr.update(f["C"], core, f["R"], 0.5)
    blocks = list(cabr.row_blocks(5500, 600))
    assert len(blocks) == 6
    for rows in reversed(blocks):
        assert torch.equal(cabr.update_block(f["C"], core, f["R"], 0.5, rows), whole[rows])


def test_double_stays_double_and_gradients_flow() -> None:
    f = {name: t.double() for name, t in _factors(7, 6, 3, 4).items()}
    A, B = f["A"].requires_grad_(), f["B"].requires_grad_()
    D = cabr.update(f["C"], cabr.core(A, B, f["U"]), f["R"], 2.0)
    assert D.dtype == torch.float64
    grad = torch.randn(7, 6, dtype=torch.float64)
    D.backward(grad)
    g_core = 2.0 * f["C"].T @ grad @ f["R"].T
    torch.testing.assert_close(A.grad, g_core @ B.detach().T)
    torch.testing.assert_close(B.grad, A.detach().T @ g_core)


def test_b_zero_and_u_zero_give_no_update() -> None:
    f = _factors(30, 20, 4, 6)
    D = cabr.update(f["C"], cabr.core(f["A"], 0 * f["B"], 0 * f["U"]), f["R"], 1.0)
    assert not D.any()


def test_folding_the_product_into_u_keeps_the_update() -> None:
    f = _factors(30, 20, 4, 6)
    before = cabr.core(f["A"], f["B"], f["U"])
    after = cabr.core(f["A"], torch.zeros_like(f["B"]), before)
    assert torch.equal(before, after)

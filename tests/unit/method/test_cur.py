from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secura_ds.method.cur import least_important, least_important_from_norms, sampled, squared_norms


def test_least_important_takes_smallest_norms_least_first() -> None:
    weight = torch.diag(torch.tensor([3.0, 1.0, 4.0, 2.0]))
    rows, columns = least_important(weight, 3)
    assert rows.tolist() == [1, 3, 0]
    assert columns.tolist() == [1, 3, 0]
    assert rows.dtype == columns.dtype == torch.int64


def test_ties_go_to_the_lower_index() -> None:
    rows, columns = least_important(torch.ones(6, 5), 4)
    assert rows.tolist() == columns.tolist() == [0, 1, 2, 3]


def test_a_zero_row_is_the_least_important() -> None:
    weight = torch.ones(4, 4)
    weight[2] = 0
    rows, _ = least_important(weight, 2)
    assert rows.tolist() == [2, 0]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 10**6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.data(),
)
def test_least_important_is_the_largest_inverted_importance(
    num_rows: int, num_columns: int, seed: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(num_rows, num_columns)))
    weight = torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for chosen, norm_sq in zip(
        least_important(weight, rank),
        (weight.double().square().sum(1), weight.double().square().sum(0)),
        strict=True,
    ):
        inverted = 1 / (norm_sq / norm_sq.sum())
        inverted = inverted / inverted.sum()
        assert len(set(chosen.tolist())) == rank
        expected = inverted.sort(descending=True).values[:rank]
        torch.testing.assert_close(inverted[chosen], expected, rtol=1e-6, atol=0)


def test_norms_of_a_weight_of_many_row_blocks() -> None:
    weight = torch.randn(700, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    row_sq, column_sq = squared_norms(weight)
    assert row_sq.dtype == column_sq.dtype == torch.float32
    torch.testing.assert_close(row_sq, weight.double().square().sum(1).float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(column_sq, weight.double().square().sum(0).float(), rtol=2e-7, atol=0)


def test_from_norms_equals_from_the_weight() -> None:
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        least_important(weight, 7), least_important_from_norms(*squared_norms(weight), 7), strict=True
    ):
        assert torch.equal(a, b)


def test_full_rank_takes_every_row_of_the_shorter_side() -> None:
    rows, columns = least_important(torch.randn(5, 9), 5)
    assert sorted(rows.tolist()) == [0, 1, 2, 3, 4]
    assert len(set(columns.tolist())) == 5


def test_one_huge_element_is_never_chosen_early() -> None:
    weight = torch.ones(8, 8)
    weight[3, 5] = 3e38
    rows, columns = least_important(weight, 7)
    assert 3 not in rows.tolist()
    assert 5 not in columns.tolist()


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_rank_out_of_bounds_names_value_and_bound(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank is {rank}, but the weight is \(4, 9\): .* at most 4"):
        least_important(torch.ones(4, 9), rank)
    with pytest.raises(ValueError, match=rf"rank is {rank}"):
        sampled(torch.ones(4, 9), rank, seed=0)


def test_all_zero_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 least important rows of the \(4, 4\) weight are all zero"):
        least_important(torch.zeros(4, 4), 2)
    weight = torch.ones(6, 6)
    weight[:, :3] = 0
    with pytest.raises(ValueError, match="3 least important columns"):
        least_important(weight, 3)
    assert least_important(weight, 4)[1].tolist() == [0, 1, 2, 3]


def test_nan_is_refused() -> None:
    weight = torch.ones(3, 3)
    weight[1, 1] = torch.nan
    with pytest.raises(ValueError, match="not numbers"):
        least_important(weight, 1)


def test_sampling_is_seeded_and_without_replacement() -> None:
    weight = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    first, again, other = (sampled(weight, 20, seed=seed) for seed in (3, 3, 4))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert len(set(a.tolist())) == 20


def test_sampling_frequencies_follow_inverted_importance() -> None:
    weight = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    draws = torch.cat([sampled(weight, 1, seed=seed)[0] for seed in range(3000)])
    counts = torch.bincount(draws, minlength=3) / 3000
    inverted = 1 / torch.tensor([1.0, 4.0, 9.0])
    torch.testing.assert_close(counts, inverted / inverted.sum(), rtol=0, atol=0.03)


def test_sampling_takes_zero_norms_first_and_all_of_them_evenly() -> None:
    weight = torch.ones(4, 5)
    weight[:, 1:3] = 0
    first = [sampled(weight, 3, seed=seed)[1].tolist() for seed in range(200)]
    assert all({1, 2} < set(columns) for columns in first)
    assert 60 < sum(columns[0] == 1 for columns in first) < 140


def test_chosen_indices_keep_nothing_else_alive() -> None:
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    for chosen in (*sampled(weight, 3, seed=1), *least_important(weight, 3)):
        assert chosen.untyped_storage().nbytes() == 3 * 8

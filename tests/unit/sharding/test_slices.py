"""Folding on slices gives the bits of the whole fold, wherever the boundaries lie."""

from __future__ import annotations

from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from allocated import AllocatedPeak
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secura_ds import sharding
from secura_ds.errors import UserError
from secura_ds.method import cabr, smagnorm
from secura_ds.reused_memory import ReusedMemory
from secura_ds.sharding import (
    Restraint,
    SliceUpdate,
    absolute_epsilons,
    fold,
    fold_slices,
    local_slice,
    slice_statistics,
)


class Ranks:
    """One weight cut into slices as ZeRO-3 cuts it."""

    def __init__(self, weight: Tensor, world: int) -> None:
        size = -(-weight.numel() // world)
        padded = torch.nn.functional.pad(weight.flatten(), (0, size * world - weight.numel()))
        self.shape, self.slices = weight.shape, padded.view(world, size).clone()

    def parameter(self, rank: int) -> SimpleNamespace:
        stored = SimpleNamespace(data=self.slices[rank], status=SimpleNamespace(name="AVAILABLE"))
        return SimpleNamespace(
            ds_id=0,
            shape=torch.Size([0]),
            ds_shape=self.shape,
            ds_numel=self.shape.numel(),
            ds_tensor=stored,
            ds_secondary_tensor=None,
            ds_process_group="all ranks",
            ds_zero_partition_rank=rank,
            ds_status=SimpleNamespace(name="NOT_AVAILABLE"),
        )


def make(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, SliceUpdate]:
    g = torch.Generator().manual_seed(rows * 1000 + columns)
    W, C, core, R = (torch.randn(s, generator=g) for s in ((rows, columns), (rows, 2), (2, 2), (2, columns)))
    return W.to(dtype), SliceUpdate(W, C.to(dtype), core, R.to(dtype), 0.3, Restraint())


def fold_by_ranks(weight: Tensor, update: SliceUpdate, world: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Fold rank after rank: a first round collects what each rank would send, a second one receives it."""
    ranks = Ranks(weight, world)
    original = ranks.slices.clone()
    reduced: dict[str, Tensor] = {}

    def reduce(values: Tensor, updates: object, operation: str) -> None:
        if operation in reduced:
            values.copy_(reduced[operation])
        else:
            sent.setdefault(operation, []).append(values.clone())

    monkeypatch.setattr(fold, "_reduce", reduce)
    for operation in ("SUM", "MAX"):
        sent: dict[str, list[Tensor]] = {}
        ranks.slices.copy_(original)
        for rank in range(world):
            fold_slices([update._replace(weight=ranks.parameter(rank))])
        if operation in sent:
            stacked = torch.stack(sent[operation])
            reduced[operation] = stacked.sum(0) if operation == "SUM" else stacked.amax(0)
    ranks.slices.copy_(original)
    for rank in range(world):
        fold_slices([update._replace(weight=ranks.parameter(rank))])
    monkeypatch.undo()
    return ranks.slices.flatten()[: weight.numel()].view(weight.shape)


RESTRAINTS = [Restraint(), Restraint(eps=None, eps_relative=0.5), Restraint(form="average"), None]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 60),
    columns=st.integers(1, 40),
    world=st.integers(1, 9),
    restraint=st.sampled_from(RESTRAINTS),
    block=st.sampled_from([8, 64, 500, 2**18]),
    pieces=st.tuples(st.integers(1, 700), st.integers(1, 700)),
)
def test_any_boundary_gives_the_same_bits(
    rows: int, columns: int, world: int, restraint: Restraint | None, block: int, pieces: tuple[int, int]
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cabr, "BLOCK_ELEMENTS", max(block, columns))
        monkeypatch.setattr(fold, "_CPU_PIECE", pieces[0])
        weight, update = make(rows, columns)
        update = update._replace(restraint=restraint)
        whole = weight.clone()
        fold_slices([update._replace(weight=whole)])
        monkeypatch.setattr(fold, "_CPU_PIECE", pieces[1])
        with pytest.MonkeyPatch.context() as inner:
            found = fold_by_ranks(weight, update, world, inner)
        assert torch.equal(found, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold_is_the_methods_s_magnorm(dtype: torch.dtype) -> None:
    weight, update = make(700, 600, dtype)
    D = cabr.update(update.C, update.core, update.R, 0.3)
    expected = smagnorm.s_magnorm(weight, D)
    fold_slices([update._replace(weight=weight)])
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("restraint", RESTRAINTS)
@pytest.mark.parametrize("held", [fold._HELD, 2_000_000, 0])
def test_holding_the_update_changes_no_bit_and_forms_it_once(
    dtype: torch.dtype, restraint: Restraint | None, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold, "_HELD", held)
    memory, formed = ReusedMemory(), []
    form = fold.update_block
    monkeypatch.setattr(fold, "update_block", lambda *a, **k: formed.append(a) or form(*a, **k))
    for rows, columns in [(4000, 600), (700, 600), (5000, 500)]:  # several blocks, one, several
        weight, update = make(rows, columns, dtype)
        update = update._replace(restraint=restraint)
        expected = weight.clone()
        fold_slices([update._replace(weight=expected)])
        formed.clear()
        fold_slices([update._replace(weight=weight)], memory=memory)
        assert torch.equal(weight, expected)
        ends = [block.stop * columns for block in cabr.row_blocks(rows, columns)]
        again = 0 if restraint is None else sum(end > held for end in ends)
        assert len(formed) == len(ends) + again


def test_no_update_leaves_every_bit() -> None:
    weight, update = make(20, 30)
    before = weight.clone()
    fold_slices([update._replace(weight=weight, core=torch.zeros(2, 2))])
    assert torch.equal(weight, before)
    found = slice_statistics([update._replace(weight=weight, core=torch.zeros(2, 2))])[0]
    assert found.ratio_max == found.relative_change == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1024, 8192])
def test_extra_memory_is_a_block_and_two_pieces_whatever_the_layers_size(
    dtype: torch.dtype, rows: int
) -> None:
    weight, update = make(rows, 1024, dtype)
    blocks = 4 * (cabr.BLOCK_ELEMENTS + 2 * fold._CPU_PIECE)
    with AllocatedPeak() as extra:
        fold_slices([update._replace(weight=weight)])
    # Beside the blocks there are R and a block's rows of C and C core, in fp32, all of rank 2.
    assert blocks <= extra.bytes <= blocks + 4 * 2 * 4 * 1024 + 4096


def test_slice_without_padding() -> None:
    ranks = Ranks(torch.arange(7.0).view(7, 1), world=3)
    pieces = [local_slice(ranks.parameter(rank)) for rank in range(3)]
    found = [(p.start, p.end, p.read(p.start, p.end, torch.empty(p.end - p.start)).tolist()) for p in pieces]
    assert found == [(0, 3, [0.0, 1.0, 2.0]), (3, 6, [3.0, 4.0, 5.0]), (6, 7, [6.0])]
    # More ranks than elements: the last ones hold padding only.
    empty = local_slice(Ranks(torch.zeros(2, 1), world=4).parameter(3))
    assert empty.start == empty.end == 2


Params4bit = type("Params4bit", (SimpleNamespace,), {})  # slices tell 4-bit weights by their type's name


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 5),
    world=st.integers(1, 7),
    storage=st.sampled_from([torch.bfloat16, torch.uint8]),
    double=st.booleans(),
    data=st.data(),
)
def test_pieces_of_4_bit_slices_are_pieces_of_the_dequantized_weight(
    rows: int, blocks: int, world: int, storage: torch.dtype, double: bool, data: st.DataObject
) -> None:
    weight = torch.randn(rows, 64 * blocks, generator=torch.Generator().manual_seed(rows))
    packed, state = bnb.functional.quantize_4bit(
        weight, quant_type="nf4", quant_storage=storage, compress_statistics=double, blocksize=64
    )
    whole = bnb.functional.dequantize_4bit(packed, state).flatten()
    ranks = Ranks(packed, world)
    covered = 0
    for rank in range(world):
        piece = local_slice(Params4bit(**vars(ranks.parameter(rank)), quant_state=state))
        assert piece.shape == weight.shape
        assert piece.start == min(covered, whole.numel())
        covered = piece.end
        if piece.start < piece.end:
            low = data.draw(st.integers(piece.start, piece.end - 1))
            high = data.draw(st.integers(low + 1, piece.end))
            assert torch.equal(piece.read(low, high, torch.empty(high - low)), whole[low:high])
            with pytest.raises(UserError, match="use strategy 'M2'"):
                piece.write(low, high, whole[low:high])
    assert covered == whole.numel()


def test_a_known_eps_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, update = make(30, 20)
    update = update._replace(weight=weight, restraint=Restraint(eps=None, eps_relative=0.5))
    (eps,) = absolute_epsilons([update])
    assert eps == pytest.approx(0.5 * float(weight.abs().mean()), rel=1e-6)
    expected = weight.clone()
    fold_slices([update._replace(weight=expected)])
    operations: list[str] = []
    monkeypatch.setattr(fold, "_reduce", lambda values, layers, operation: operations.append(operation))
    fold_slices([update._replace(eps=eps)])
    assert operations == ["MAX"]
    assert torch.equal(weight, expected)


def test_slices_that_cannot_be_folded() -> None:
    parameter = Ranks(torch.zeros(4, 4), world=2).parameter(0)
    parameter.ds_tensor.status.name = "NOT_AVAILABLE"
    with pytest.raises(UserError, match="on NVMe"):
        local_slice(parameter)
    parameter = Ranks(torch.zeros(4, 4), world=2).parameter(0)
    parameter.ds_secondary_tensor = torch.zeros(4)
    with pytest.raises(UserError, match="zero_hpz_partition_size"):
        local_slice(parameter)


def test_plain_parameters_need_no_gathering() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    assert not sharding.is_sharded(parameter)
    assert sharding.is_available(parameter)
    assert sharding.full_shape(parameter) == (2, 3)
    with sharding.gathered(parameter, writable=True):
        pass
    sharding.set_parameter(parameter, torch.full((2, 3), 2.0))
    assert sharding.whole(parameter).tolist() == [[2.0] * 3] * 2
    sharding.zero_(parameter)
    assert float(parameter.detach().abs().max()) == 0
    with pytest.raises(UserError, match="shape \\(3, 2\\) does not fit"):
        sharding.set_parameter(parameter, torch.zeros(3, 2))

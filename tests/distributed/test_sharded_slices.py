"""M1 folds on one to four ranks: the bits of the unsharded fold, what is sent, what is held, what is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import adapter_toys as toys
import pytest
from training_toys import free_port

sys.path.insert(0, str(Path(__file__).resolve().parent))

import slices_worker as worker  # noqa: E402

# One run of the launcher serves every test here.
pytestmark = pytest.mark.timeout(600)
RANKS = 4
LAYERS = 14


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four ranks has found."""
    folder = tmp_path_factory.mktemp("slices")
    # bitsandbytes' CPU kernel is at home only where blocks of 64 end with the rows.
    toys.toy_llama(intermediate_size=192).save_pretrained(folder / "base")
    launcher = str(Path(sys.executable).parent / "deepspeed")
    command = [sys.executable, launcher, "--num_accelerators", str(RANKS), "--master_port", str(free_port())]
    command += [worker.__file__, "--base", str(folder / "base"), "--out", str(folder / "found")]
    root = str(Path(worker.__file__).resolve().parents[2])
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    return [json.loads((folder / f"found.{rank}.json").read_text()) for rank in range(RANKS)]


def sent(traffic: list[list[Any]]) -> dict[str, list[int]]:
    """The bytes of every collective, by its name."""
    return {name: [size for other, size in traffic if other == name] for name, _ in traffic}


@pytest.mark.parametrize("world", worker.WORLDS)
def test_every_slice_has_the_bits_of_the_unsharded_fold(ranks: list[dict[str, Any]], world: int) -> None:
    found = [rank["bits"][str(world)] for rank in ranks[:world]]
    for rank in found:
        assert len(rank["equal"]) == 2 * len(worker.DTYPES) * len(worker.RESTRAINTS)
        assert [case for case, equal in rank["equal"].items() if not equal] == []
    # In every fold, boundaries lie within a row: at least two weights for each rank but the first.
    assert [rank["mid_row"] >= 2 * 8 for rank in found] == [False] + [True] * (world - 1)


@pytest.mark.parametrize("world", worker.WORLDS)
def test_a_fold_sends_one_float_per_layer_and_gathers_nothing(
    ranks: list[dict[str, Any]], world: int
) -> None:
    layers = len(worker.SHAPES)
    for rank in ranks[:world]:
        traffic = rank["bits"][str(world)]["traffic"]
        assert sent(traffic["absolute"]) == sent(traffic["average"]) == {"allreduce_": [4 * layers]}
        # Weights that no forward pass has measured yet: their means come first, one double each.
        assert sent(traffic["relative"]) == {"allreduce_": [8 * layers, 4 * layers]}
        assert traffic["never"] == []


@pytest.mark.parametrize("world", worker.WORLDS)
def test_a_fold_holds_a_row_block_and_two_pieces_whatever_the_weights_size(
    ranks: list[dict[str, Any]], world: int
) -> None:
    for rank in ranks[:world]:
        small, large = rank["memory"][str(world)].values()
        assert small == large
        workspace = 4 * (32 * 601 + 2 * worker.PIECE)
        # R and a block's rows of C and C core, of rank 2, come on top.
        assert workspace < small < workspace + 4 * (2 * 601 + 3 * 32 * 2) + 1024


@pytest.mark.parametrize(
    ("case", "status", "most"),
    [("persistent", "AVAILABLE", 8), ("kept", "AVAILABLE", LAYERS), ("fetched ahead", "INFLIGHT", LAYERS)],
)
def test_no_copy_that_deepspeed_keeps_outlives_a_fold(
    ranks: list[dict[str, Any]], case: str, status: str, most: int
) -> None:
    for rank in ranks:
        found = rank["copies"][case]
        # The case is real: before the fold DeepSpeed did keep, or was fetching, whole weights.
        assert 0 < found["held"][status] <= most
        assert found["left"] == {"AVAILABLE": 0, "INFLIGHT": 0, "NOT_AVAILABLE": LAYERS}
        assert found["equal"]
        assert found["logit_gap"] == 0.0
        traffic = sent(found["traffic"])
        assert traffic.pop("allreduce_") == [4 * LAYERS]
        # A and B (8 x 12) may have to be gathered, a quarter from each rank.
        assert all(size == 8 * 12 * 4 for size in traffic.pop("_allgather_base_", []))
        assert traffic == {}


def test_a_fold_by_m2_touches_only_the_accumulators(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["M2"]
        assert found["unchanged"] and found["moved"]
        assert sent(found["traffic"]) == {"_allgather_base_": [8 * 12 * 4] * 2 * LAYERS}
        # A and B, gathered for all layers at once, and an (8, 8) accumulator for each.
        assert found["extra_bytes"] <= found["trained_bytes"] + LAYERS * 4 * 8 * 8 + 4096


@pytest.mark.parametrize("world", worker.WORLDS)
def test_slices_of_4_bit_weights_are_read_as_the_whole_is(ranks: list[dict[str, Any]], world: int) -> None:
    found = [rank["packed"][str(world)] for rank in ranks[:world]]
    assert [rank["differ"] for rank in found] == [0] * world
    assert sum(rank["elements"] for rank in found) == 53 * 192 + 64 * 64 + 128
    # Thirds begin within a block of constants, except of the 53 x 192.
    assert [rank["mid_block"] for rank in found] == [0, 2, 2] or world != 3


def test_statistics_of_sharded_4_bit_weights(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["nf4"]
        assert found["agree"]
        assert len(found["statistics"]) == LAYERS
        for name, expected in found["alone"].items():
            assert found["statistics"][name] == pytest.approx(expected, rel=1e-6)
            assert 0 < expected["relative_change"] < 1
        traffic = sent(found["traffic"])
        # max L, then three sums in double; the means are known from the forward pass. No weight is gathered.
        assert traffic.pop("allreduce_") == [4 * LAYERS, 8 * 3 * LAYERS]
        assert traffic == {"_allgather_base_": [8 * 12 * 2] * 2 * LAYERS}

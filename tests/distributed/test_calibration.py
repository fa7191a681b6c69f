from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from calibration_toys import calibrate_all_modes, toy_llama
from torch import Tensor

WORKER = Path(__file__).with_name("calibration_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two gloo ranks wrote what they got from a ZeRO-3 partitioned model."""
    folder = tmp_path_factory.mktemp("calibration")
    toy_llama().save_pretrained(folder / "base")
    paths = [str(WORKER.parents[2]), str(WORKER.parents[1])]
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(WORKER), str(folder / "base"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Tensor]]:
    """The same from a plain model in this one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secura_ds.calibration.text.SEQUENCE_LENGTH", 20)
        patch.setattr("secura_ds.calibration.sensitivity.FORWARD_BATCH", 2)
        patch.setattr("secura_ds.calibration.text.GENERATION_BATCH", 10)
        yield calibrate_all_modes(toy_llama(), tmp_path_factory.mktemp("alone"))
    torch.set_num_threads(threads)


def test_every_rank_has_the_same_text_and_factors(ranks: Path) -> None:
    first, second = (torch.load(ranks / f"{rank}.pt") for rank in range(2))
    assert len(first) == 1 + 8 * 14
    assert first["token_ids"].shape == (25, 20)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_two_sharded_ranks_get_what_one_plain_process_gets(ranks: Path, alone: dict[str, Tensor]) -> None:
    sharded = torch.load(ranks / "0.pt")
    assert alone.keys() == sharded.keys()
    for name, value in alone.items():
        assert value.any(), name
        assert torch.equal(value, sharded[name]), name


def test_a_layer_that_fails_on_one_rank_is_named_on_all(ranks: Path) -> None:
    messages = [(ranks / f"{rank}.error").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert messages[0].startswith("model.layers.1.mlp.")
    assert "had no input" in messages[0]

"""Other methods than SECURA on two ranks under DeepSpeed: against one process, cut and resumed, refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from method_toys import override
from safetensors.torch import load_file
from torch import Tensor
from training_toys import losses, quiet_environment, write_toy

from secura_ds.recipe import load_recipe
from secura_ds.training import train

pytestmark = pytest.mark.long

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from methods_worker import CASES, REFUSED, RESUMED  # noqa: E402


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def two_ranks(toy: Path) -> dict[str, str]:
    """All two-rank runs, in the toy's folder; their outcome by name."""
    result = toy.parent / "result.json"
    launcher = str(Path(sys.executable).parent / "deepspeed")
    port = str(20000 + os.getpid() % 20000)
    worker = [str(HERE / "methods_worker.py"), str(toy), str(result)]
    done = subprocess.run(
        [launcher, "--num_accelerators", "2", "--master_port", port, *worker],
        cwd=toy.parent,
        env=quiet_environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.is_file(), done.stdout[-4000:] + done.stderr[-4000:]
    outcome: dict[str, str] = json.loads(result.read_text())
    return outcome


def result_of(run: Path) -> dict[str, Tensor]:
    files = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    assert files
    return {key: value for file in files for key, value in load_file(file).items()}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process_does(toy: Path, two_ranks: dict[str, str], name: str) -> None:
    assert two_ranks[name] == "finished"
    alone = toy.parent / "one" / name
    method = override(CASES[name][0])
    train(load_recipe(toy, [method, f"training.output_dir={alone}", "training.max_steps=4"]))
    assert losses(toy.parent / name) == pytest.approx(losses(alone), rel=2e-5)
    together, single = result_of(toy.parent / name), result_of(alone)
    assert together.keys() == single.keys()
    for key, value in single.items():
        assert torch.allclose(together[key].float(), value.float(), rtol=1e-3, atol=1e-4), key


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_same_run(toy: Path, two_ranks: dict[str, str], name: str) -> None:
    assert two_ranks[f"{name}-cut"] == "finished"
    whole, cut = toy.parent / name, toy.parent / f"{name}-cut"
    assert losses(cut) == losses(whole)
    for file in ("trained.safetensors", "optimizer.safetensors"):
        path = f"checkpoints/step-000004/{file}"
        assert (cut / path).read_bytes() == (whole / path).read_bytes()


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_need_whole_weights_are_refused(two_ranks: dict[str, str], method: str) -> None:
    assert f'adapter.method is "{method}", which' in two_ranks[f"{method}-refused"]
    assert "zero3.json shards them (ZeRO-3)" in two_ranks[f"{method}-refused"]

"""DeepSpeed configurations and launches that do not go with the recipe: one line for each problem, exit 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_toys import ZERO, launch, write_toy

TWO_RANKS = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of 2 examples x 2 passes, on as many ranks as are launched."""
    return write_toy(tmp_path_factory.mktemp("toy"))


def errors(toy: Path, *options: str, **environment: str) -> list[str]:
    """What launch/train.py says in refusing, before it connects to other ranks; nothing is written."""
    before = sorted(toy.parent.rglob("*"))
    done = launch(toy, *(f"--set={option}" for option in options), **environment)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert sorted(toy.parent.rglob("*")) == before
    return done.stderr.split("error: ")[1].splitlines()


def configuration(toy: Path, **changes: Any) -> str:
    """A ZeRO-3 configuration with some values of its own, as an override of the recipe."""
    (toy.parent / "own.json").write_text(json.dumps({**ZERO, **changes}))
    return "training.deepspeed=own.json"


def test_a_configuration_without_a_launcher(toy: Path) -> None:
    (line,) = errors(toy, "training.deepspeed=zero3.json")
    assert "deepspeed launch/train.py" in line and "--set training.deepspeed=null" in line


def test_sections_that_are_no_objects(toy: Path) -> None:
    lines = errors(toy, configuration(toy, zero_optimization=3, bf16=True), **TWO_RANKS)
    assert len(lines) == 2
    assert "own.json: zero_optimization is 3" in lines[0] and '{"stage": 3}' in lines[0]
    assert "own.json: bf16 is True" in lines[1] and '{"enabled": "auto"}' in lines[1]


def test_what_the_recipe_decides_is_not_decided_twice(toy: Path) -> None:
    """All of it in one answer, beside a value that differs; what is switched off is no problem."""
    changes = {
        "optimizer": {"type": "Adam", "params": {"lr": 1}},
        "scheduler": {"type": "WarmupLR"},
        "elasticity": {"enabled": True, "max_train_batch_size": 8, "micro_batch_sizes": [2]},
        "amp": {"enabled": True},
        "torch_autocast": {"enabled": False},
        "gradient_clipping": 0.5,
    }
    lines = errors(toy, configuration(toy, **changes), **TWO_RANKS)
    said = ["training.optimizer", "training.scheduler", "training.micro_batch_size", "backbone.dtype", "0.5"]
    assert len(lines) == 5
    for line, key, words in zip(
        lines, ["optimizer", "scheduler", "elasticity", "amp", "gradient_clipping"], said, strict=True
    ):
        assert f"own.json: {key} is " in line and words in line


def test_every_contradiction_names_both_values(toy: Path) -> None:
    changes = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 8,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "fp16": {"enabled": True},
    }
    lines = errors(toy, configuration(toy, **changes), **TWO_RANKS)
    assert len(lines) == 5
    for line, words in zip(
        lines,
        [
            ("train_micro_batch_size_per_gpu is 4", "training.micro_batch_size is 2"),
            ("gradient_accumulation_steps is 8", "training.gradient_accumulation_steps is 2"),
            ("gradient_clipping is 0.5", "training.max_grad_norm is 1.0"),
            ("bf16.enabled is True", 'backbone.dtype is "float32"'),
            ("fp16.enabled is True", 'backbone.dtype is "float32"'),
        ],
        strict=True,
    ):
        assert all(word in line for word in (*words, "own.json", 'write "auto" here'))


def test_a_number_of_ranks_that_does_not_make_the_batch(toy: Path) -> None:
    (line,) = errors(toy, configuration(toy, train_batch_size=12), **TWO_RANKS)
    assert "train_batch_size is 12, but 2 x 2 x 2 " in line and "or launch 3 ranks" in line
    assert "or set training.gradient_accumulation_steps=3" in line
    (line,) = errors(toy, configuration(toy, train_batch_size=4), **TWO_RANKS)
    assert "or launch 1 rank," in line and "gradient_accumulation_steps=1" in line
    (line,) = errors(toy, configuration(toy, train_batch_size=7), **TWO_RANKS)
    assert "is 8" in line and "launch" not in line.split("is 8")[1]


def test_what_a_rank_could_not_fold(toy: Path) -> None:
    zero = {"stage": 3, "offload_param": {"device": "nvme"}, "zero_quantized_weights": True}
    (line,) = errors(toy, configuration(toy, zero_optimization=zero), **TWO_RANKS)
    assert "offload_param.device is 'nvme'" in line and "zero_quantized_weights is True" in line


def test_paged_optimizers_need_a_gpu(toy: Path) -> None:
    (line,) = errors(toy, "training.optimizer=paged_adamw_8bit", CUDA_VISIBLE_DEVICES="")
    assert 'training.optimizer is "paged_adamw_8bit"' in line and '"adamw_8bit"' in line


def test_an_optimizer_whose_state_cannot_be_cut(toy: Path) -> None:
    (line,) = errors(toy, "training.deepspeed=zero3.json", "training.optimizer=adamw_8bit", **TWO_RANKS)
    assert '"adamw_8bit"' in line and "adamw_torch_fused" in line

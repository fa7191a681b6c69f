"""Gloo ranks under ZeRO-3 against one process: the same losses, the same bits, the same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import adapter_toys as toys
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from training_toys import free_port

from secura_ds.adapter import layer_statistics

sys.path.insert(0, str(Path(__file__).resolve().parent))

import zero3_worker as worker  # noqa: E402

# One run of the launcher serves every test here; it takes under a minute on two idle cores.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    toys.toy_llama().save_pretrained(folder)
    toys.toy_llama(seed=3).save_pretrained(f"{folder}-foreign")
    return folder


def launch(base: Path, ranks: int) -> dict[str, Any]:
    """What the ranks have found, from one run of the launcher."""
    out = base.parent / f"found-{ranks}.json"
    launcher = Path(sys.executable).parent / "deepspeed"
    options = ["--num_accelerators", str(ranks), "--master_port", str(free_port())]
    command = [
        sys.executable,
        str(launcher),
        *options,
        worker.__file__,
        "--base",
        str(base),
        "--out",
        str(out),
    ]
    root = Path(worker.__file__).resolve().parents[2]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    return json.loads(out.read_text()) | {"folder": out.parent}


@pytest.fixture(scope="module")
def found(base: Path) -> dict[str, Any]:
    return launch(base, ranks=2)


@pytest.fixture(scope="module")
def alone(base: Path) -> dict[str, Any]:
    return launch(base, ranks=1)


class Boundary(torch.autograd.Function):
    """The identity that ZeRO-3 puts at every module's inputs, to learn when its backward pass is over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def add_up_as_zero3_does(model: nn.Module) -> None:
    """Let autograd add up a module's gradients first, and those of its surroundings to the sum.

    That order is all in which a ZeRO-3 rank that is alone differs from a process without DeepSpeed, and in
    fp32 it shows in the last bit of gradients of three or more parts, such as an RMSNorm's in a residual.
    """

    def mark(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(Boundary.apply(x) if isinstance(x, Tensor) else x for x in inputs)

    for module in model.modules():
        module.register_forward_pre_hook(mark)


def single_process_losses(
    base: Path, variant: dict[str, Any], ranks: int, *, order: Any = None
) -> list[float]:
    loaded = worker.load_plain(base, variant.get("bf16", False), variant.get("nf4", False))
    model = get_peft_model(loaded, toys.config(**worker.variant_config(variant)))
    worker.prepare(model, variant)
    if order is not None:
        order(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=worker.LEARNING_RATE, weight_decay=0.0)
    accumulate = variant.get("accumulate", 1)

    def step(batch: Tensor) -> float:
        total = torch.zeros(())
        for part in batch.view(ranks, accumulate, -1).unbind(1):
            loss = model(input_ids=part, labels=part).loss
            (loss / accumulate).backward()
            total += loss.detach() / accumulate
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return toys.train(model, step, worker.batches(ranks * accumulate), fold_every=2)


@pytest.mark.parametrize("name", worker.VARIANTS)
def test_losses_equal_the_single_process_run(found: dict[str, Any], base: Path, name: str) -> None:
    expected = single_process_losses(base, worker.VARIANTS[name], ranks=2)
    assert found["losses"][name] == pytest.approx(expected, abs=1e-6)
    # The adapter moves the loss by far more than the tolerance, so equal losses mean equal updates.
    assert abs(expected[-1] - expected[0]) > 1e-3


@pytest.mark.parametrize("name", worker.ALONE)
def test_one_rank_gives_the_bits_of_a_process_without_deepspeed(
    alone: dict[str, Any], base: Path, name: str
) -> None:
    variant = worker.VARIANTS[name]
    order = add_up_as_zero3_does if variant.get("zero", {}).get("stage", 3) == 3 else None
    assert alone["losses"][name] == single_process_losses(base, variant, ranks=1, order=order)


@pytest.mark.parametrize("name", worker.BF16_VARIANTS)
def test_bf16_losses_follow_the_single_process_run(found: dict[str, Any], base: Path, name: str) -> None:
    expected = single_process_losses(base, worker.BF16_VARIANTS[name], ranks=2)
    assert found["losses"][name] == pytest.approx(expected, abs=0.01)
    assert found["losses"][name] == pytest.approx(found["losses"]["forward"], abs=0.2)


def test_saved_adapter_loads_onto_a_sharded_base(found: dict[str, Any]) -> None:
    loaded = PeftModel.from_pretrained(toys.toy_llama(), found["folder"] / "adapter")
    expected = toys.logits(loaded)
    assert float((expected - toys.logits(toys.toy_llama())).abs().max()) > 0.1
    torch.testing.assert_close(torch.tensor(found["saving"]["logits"]), expected, rtol=0, atol=1e-5)
    assert "does not belong to this base model" in found["saving"]["foreign"]


def test_creation_holds_one_weight_at_a_time(found: dict[str, Any]) -> None:
    assert found["creation"]["most"] == found["creation"]["largest"] == 64 * 160
    assert found["creation"]["available_after"] == 0
    assert found["creation"]["adapter_dtype"] == "torch.float32"


def test_forward_without_an_engine_gathers_what_it_needs(found: dict[str, Any]) -> None:
    expected = toys.logits(toys.toy_llama())
    torch.testing.assert_close(torch.tensor(found["creation"]["logits"]), expected, rtol=0, atol=1e-6)


def test_what_cannot_be_done_is_said_in_one_line(found: dict[str, Any]) -> None:
    assert "launch/merge.py" in found["creation"]["merge"]
    assert "first is model.embed_tokens.weight" in found["creation"]["unsharded"]
    assert "save_adapter" in found["saving"]["plain_save"]
    for message in (
        found["creation"]["merge"],
        found["creation"]["unsharded"],
        found["saving"]["plain_save"],
    ):
        assert "\n" not in message


def test_adapter_is_saved_whole(found: dict[str, Any]) -> None:
    assert found["saving"]["empty"] == []
    assert found["saving"]["keys"] == 14 * 7
    loaded = PeftModel.from_pretrained(toys.toy_llama(), found["folder"] / "adapter")
    first = loaded.base_model.model.model.layers[0].self_attn.q_proj.secura_B["default"]
    torch.testing.assert_close(first, torch.randn(12, 8, generator=torch.Generator().manual_seed(0)))
    statistics = layer_statistics(loaded)
    assert statistics.keys() == found["saving"]["statistics"].keys()
    for layer, expected in statistics.items():
        assert found["saving"]["statistics"][layer] == pytest.approx(expected, rel=1e-6)


def test_masters_follow_written_values_and_folds(found: dict[str, Any]) -> None:
    assert found["saving"]["master_difference"] == 0.0
    assert found["saving"]["master_after_fold"] == 0.0

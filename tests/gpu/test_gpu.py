"""The same numbers on a GPU as on processors, whole runs on it, and memory as planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapter_toys as toys
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from training_toys import adapter, launch, losses, write_toy
from transformers import AutoModelForCausalLM

from secura_ds import sharding
from secura_ds.adapter import fold
from secura_ds.adapter.restrained import Update, restrained_linear
from secura_ds.recipe import load_recipe
from secura_ds.training import train

SHAPE = (1031, 517)


def parts(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W": SHAPE, "C": (SHAPE[0], 8), "core": (8, 8), "R": (8, SHAPE[1]), "x": (64, SHAPE[1])}
    return {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}


@pytest.fixture(autouse=True)
def _exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def test_the_restrained_layer_computes_what_a_processor_does() -> None:
    def outcome(device: str) -> list[torch.Tensor]:
        given = parts(device)
        x, core = given["x"].requires_grad_(), given["core"].requires_grad_()
        update = Update(given["C"], given["R"], 0.5, sharding.Restraint(), 1e-10)
        y = restrained_linear(x, lambda: given["W"], None, core, update)
        y.square().mean().backward()
        assert x.grad is not None and core.grad is not None
        return [y.detach().cpu(), x.grad.cpu(), core.grad.cpu()]

    for got, expected in zip(outcome("cuda"), outcome("cpu"), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


def test_a_fold_on_the_gpu_is_that_of_a_processor() -> None:
    folded = []
    for device in ("cuda", "cpu"):
        given = parts(device)
        update = sharding.SliceUpdate(
            given["W"], given["C"], given["core"], given["R"], 0.5, sharding.Restraint()
        )
        sharding.fold_slices([update])
        folded.append(given["W"].cpu())
    torch.testing.assert_close(folded[0], folded[1], rtol=1e-4, atol=1e-4)


def test_4_bit_weights_are_those_of_a_processor_but_for_rare_ties() -> None:
    import bitsandbytes as bnb

    weight = parts("cpu")["W"][:1024, :512].contiguous().bfloat16()
    found = []
    for device in ("cuda", "cpu"):
        layer = bnb.nn.Linear4bit(
            512,
            1024,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            quant_storage=torch.bfloat16,
        )
        layer.weight = sharding.quantized.quantized_parameter(layer, weight, torch.device(device))
        found.append(sharding.dequantized(layer).cpu())
    assert float((found[0] != found[1]).float().mean()) < 1e-3


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_toy(tmp_path)


FORWARD = ["adapter.smagnorm.apply=forward"]
NF4 = ["backbone.quantization.kind=nf4", *FORWARD]
CHECKPOINTS = ["training.gradient_checkpointing=true"]
# What runs on the GPU, and what the processor's run with the same losses is told.
CASES: dict[str, tuple[list[str], list[str]]] = {
    "bf16": ([], []),
    "forward": (FORWARD, FORWARD),
    "checkpointing": (CHECKPOINTS, []),
    "offloading": ([*CHECKPOINTS, "training.activation_offloading=true"], []),
    "nf4": (NF4, NF4),
    "nf4, checkpointing": ([*NF4, *CHECKPOINTS], NF4),
    "8 bits": (["training.optimizer=adamw_8bit"], []),
    "paged, 8 bits": (["training.optimizer=paged_adamw_8bit"], []),
    "paged, 32 bits": (["training.optimizer=paged_adamw_32bit"], []),
}


@pytest.mark.parametrize("name", CASES)
def test_runs_have_the_losses_of_a_processor(toy: Path, name: str) -> None:
    for device, options in zip(("gpu", "cpu"), CASES[name], strict=True):
        chosen = {"DS_ACCELERATOR": "cuda"} if device == "gpu" else {"CUDA_VISIBLE_DEVICES": ""}
        settings = ["backbone.dtype=bfloat16", f"training.output_dir={device}", *options]
        done = launch(toy, *(f"--set={setting}" for setting in settings), **chosen)
        assert done.returncode == 0, done.stderr
    assert losses(toy.parent / "gpu") == pytest.approx(losses(toy.parent / "cpu"), rel=3e-2)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4"])
def test_zero3_on_one_gpu_is_the_run_without_it(toy: Path, kind: str) -> None:
    dtype = "float32" if kind == "float32" else "bfloat16"
    options = [f"--set=backbone.dtype={dtype}", "--set=adapter.smagnorm.apply=forward"]
    options += ["--set=backbone.quantization.kind=nf4"] if kind == "nf4" else []
    gpu = {"DS_ACCELERATOR": "cuda"}
    plain = launch(toy, *options, "--set=training.output_dir=plain", **gpu)
    sharded = launch(
        toy,
        *options,
        "--set=training.output_dir=sharded",
        "--set=training.deepspeed=zero3.json",
        ranks=1,
        **gpu,
    )
    assert plain.returncode == sharded.returncode == 0, plain.stderr + sharded.stderr
    tolerance = 1e-5 if kind == "float32" else 3e-2
    assert losses(toy.parent / "sharded") == pytest.approx(losses(toy.parent / "plain"), rel=tolerance)
    base = AutoModelForCausalLM.from_pretrained(toy.parent / "backbone", dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, toy.parent / "sharded" / "adapter")
    assert adapter(toy.parent / "sharded").keys() == adapter(toy.parent / "plain").keys()
    assert isinstance(loaded, nn.Module)


def test_folding_does_not_change_the_function() -> None:
    for strategy in ("M1", "M2"):
        model = get_peft_model(
            toys.toy_llama().cuda(), toys.config(smagnorm={"apply": "forward"}, strategy=strategy)
        )
        toys.randomize(model)
        ids = toys.tokens().cuda()
        before = toys.logits(model, ids)
        fold(model)
        torch.testing.assert_close(toys.logits(model, ids), before, rtol=1e-4, atol=1e-4)


def test_the_planned_memory_is_recorded_beside_the_measured(toy: Path) -> None:
    options = [f"training.output_dir={toy.parent / 'planned'}", "backbone.dtype=bfloat16"]
    train(load_recipe(toy, options))
    run: dict[str, Any] = json.loads((toy.parent / "planned" / "run.json").read_text())
    assert run["planned_memory_bytes"] > 0
    assert run["peak_memory_bytes"] > 0

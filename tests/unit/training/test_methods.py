"""Every method through the one training loop: what it trains, saving, loading, going on, merging."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from method_toys import ADAPTERS, TRAINED, override
from safetensors.torch import load_file
from torch import Tensor
from training_toys import losses, write_toy
from transformers import AutoModelForCausalLM, PreTrainedModel

from secura_ds.adapter import load_adapter
from secura_ds.backbones import load_model
from secura_ds.merge import merge
from secura_ds.recipe import Recipe, load_recipe
from secura_ds.training import build_model
from secura_ds.training.model import trainable
from secura_ds.training.run import Stage, train


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


def recipe_of(toy: Path, method: str, *options: str) -> Recipe:
    given = [option for option in options if option.startswith("training.output_dir")]
    place = [] if given else [f"training.output_dir={toy.parent / method}"]
    return load_recipe(toy, [override(method), *place, *options])


def backbone(toy: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(toy.parent / "backbone")
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    result: Tensor = model.eval()(torch.arange(5, 45).view(2, 20)).logits
    return result


@pytest.mark.parametrize("method", ADAPTERS)
def test_it_starts_as_the_backbone_and_trains_what_its_paper_says(toy: Path, method: str) -> None:
    model, _ = build_model(recipe_of(toy, method))
    assert sum(p.numel() for p in trainable(model).values()) == TRAINED[method]
    torch.testing.assert_close(logits(model), logits(backbone(toy)), rtol=1e-4, atol=1e-4)
    ids = torch.arange(5, 45).view(2, 20)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    for _ in range(2):  # A gets its first gradient when B is no longer 0
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trainable(model))


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_resumed_run_is_the_same_run_and_its_result_loads_and_merges(toy: Path, method: str) -> None:
    options = ["training.max_steps=4", "training.save_steps=2"]
    summary = train(recipe_of(toy, method, *options))
    whole, cut = toy.parent / method, toy.parent / f"{method}-cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints/step-000004")
    (cut / "run.json").unlink()
    result = "model" if method.startswith("full") else "adapter"
    shutil.rmtree(cut / result)
    train(recipe_of(toy, method, *options, f"training.output_dir={cut}"), resume=True)
    assert losses(cut) == losses(whole)
    for name in ("trained.safetensors", "optimizer.safetensors"):
        path = f"checkpoints/step-000004/{name}"
        assert (cut / path).read_bytes() == (whole / path).read_bytes()
    for file in (whole / result).glob("*.safetensors"):
        assert (cut / result / file.name).read_bytes() == file.read_bytes()
    assert summary.trainable_parameters == TRAINED[method]
    assert json.loads((whole / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("method", ADAPTERS)
def test_what_was_trained_is_what_loads_and_what_is_merged(toy: Path, method: str, tmp_path: Path) -> None:
    recipe = recipe_of(toy, method, "training.max_steps=3", f"training.output_dir={tmp_path / 'run'}")
    trained = trained_logits(recipe)
    if method.startswith("full"):
        merged = tmp_path / "run/model"
    else:
        loaded = load_adapter(backbone(toy), tmp_path / "run/adapter")
        torch.testing.assert_close(logits(loaded), trained, rtol=1e-3, atol=1e-3)
        merged = tmp_path / "merged"
        report = merge(toy.parent / "backbone", tmp_path / "run/adapter", merged)
        assert report.max_logit_gap is not None and report.max_logit_gap < 1e-3
    model = AutoModelForCausalLM.from_pretrained(merged).eval()
    torch.testing.assert_close(logits(model), trained, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(trained, logits(backbone(toy)), rtol=1e-2, atol=1e-2)
    stored = {key for file in merged.glob("*.safetensors") for key in load_file(file)}
    base = {key for file in (toy.parent / "backbone").glob("*.safetensors") for key in load_file(file)}
    assert stored == base


@pytest.mark.parametrize("method", ["cabr", "cur-lora", "corda", "osf"])
def test_in_half_precision_too(toy: Path, method: str, tmp_path: Path) -> None:
    narrow = ["backbone.dtype=bfloat16", f"training.output_dir={tmp_path}", "training.max_steps=3"]
    recipe = recipe_of(toy, method, *narrow, "training.gradient_checkpointing=true")
    start, _ = build_model(recipe)
    plain = logits(load_model(recipe.backbone))
    # What CorDA leaves of a weight is rounded; a forward in bfloat16 is off by as much, 0.03.
    assert relative(logits(start), plain) < 0.03
    trained = trained_logits(recipe)
    assert all(p.dtype == torch.float32 for p in trainable(start).values())
    loaded = load_adapter(load_model(recipe.backbone), tmp_path / "adapter")
    assert relative(logits(loaded), trained) <= (0.03 if method == "corda" else 0.0)
    assert relative(plain, trained) > 0.1


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def trained_logits(recipe: Recipe) -> Tensor:
    """Train, and take the logits of the model in memory as it was at the end."""
    found: list[Tensor] = []
    train(recipe, stage=Stage(measure=lambda trainer: found.append(logits(trainer.model))))
    return found[0]

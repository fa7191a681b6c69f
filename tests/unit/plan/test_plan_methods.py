"""Every method's plan against the model that training builds, its allocations and the files it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from allocated import AllocatedPeak
from method_toys import ADAPTERS, TRAINED, override
from training_toys import write_toy
from transformers import PreTrainedConfig

from secura_ds.backbones import head, load_config
from secura_ds.backbones.adapter import backbone_of
from secura_ds.errors import UserError
from secura_ds.plan import Plan, Work, plan
from secura_ds.plan.blueprint import draw
from secura_ds.plan.simulation import Event, simulate
from secura_ds.recipe import Recipe, load_recipe
from secura_ds.training import build_model, train
from secura_ds.training.memory import _without_calibration


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


def recipe_of(toy: Path, method: str, *options: str) -> Recipe:
    return load_recipe(toy, [override(method), *options])


def config_of(recipe: Recipe) -> PreTrainedConfig:
    return load_config(recipe.backbone)


def planned(recipe: Recipe) -> Plan:
    return plan(recipe, config_of(recipe), device="cpu")


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_drawn_model_is_the_real_one_tensor_by_tensor(toy: Path, method: str) -> None:
    recipe = recipe_of(toy, method)
    drawn, real = draw(recipe, config_of(recipe), sharded=False), build_model(recipe)[0]

    def facts(model: torch.nn.Module) -> dict[str, tuple[object, ...]]:
        found = {n: (p.nbytes, p.dtype, p.requires_grad) for n, p in model.named_parameters()}
        return found | {n: (b.nbytes, b.dtype, False) for n, b in model.named_buffers()}

    assert facts(drawn) == facts(real)
    assert all(tensor.device.type == "meta" for tensor in (*drawn.parameters(), *drawn.buffers()))
    assert planned(recipe).trained_parameters == TRAINED[method]


def highest(events: list[Event]) -> int:
    level = peak = 0
    for event in events:
        peak = max(peak, level + event.peak)
        level += event.change
    return peak


@pytest.mark.parametrize("method", ["cabr", "cur-lora", "corda", "osf", "full", "full-targets"])
def test_a_pass_takes_what_the_allocator_hands_out(toy: Path, method: str) -> None:
    recipe, work = recipe_of(toy, method), Work(batch=3, length=160, learnt=300)
    expected = highest(simulate(draw(recipe, config_of(recipe), sharded=False), work, device="cpu").events)
    model = build_model(recipe)[0].train()
    head.add_summed_loss(backbone_of(model))
    ids = torch.randint(5, 250, (work.batch, work.length))
    mask = torch.ones_like(ids)
    mask[0, -20:] = 0
    targets = torch.full_like(ids, head.IGNORED)
    targets.view(-1)[: work.learnt] = 7

    def run() -> None:
        model(input_ids=ids, attention_mask=mask, targets=targets).backward()
        model.zero_grad(set_to_none=True)

    run()  # once, as the first pass makes what later ones find
    with AllocatedPeak() as measured:
        run()
    assert expected == pytest.approx(measured.bytes, rel=0.05)


@pytest.mark.parametrize("method", ["cabr", "cur-lora", "corda", "osf", "full", "full-targets"])
def test_files_are_as_large_as_planned(toy: Path, method: str, tmp_path: Path) -> None:
    recipe = recipe_of(toy, method, f"training.output_dir={tmp_path}", "training.max_steps=2")
    sizes = planned(recipe).disk
    train(recipe)

    def size(*paths: Path) -> int:
        return sum(path.stat().st_size for path in paths)

    names = 16_384  # of tensors, in the files' headers
    result = "model" if method.startswith("full") else "adapter"
    assert 0 <= size(*(tmp_path / result).glob("*.safetensors")) - sizes["adapter"] < names
    step = tmp_path / "checkpoints" / "step-000002"
    assert 0 <= size(*step.glob("*.safetensors")) - sizes["checkpoint"] < names
    factors = [path for path in (tmp_path / "checkpoints").glob("factors*")]
    assert 0 <= size(*factors) - sizes["factors"] < names


def test_weights_that_are_trained_themselves_are_counted_once(toy: Path) -> None:
    found = planned(recipe_of(toy, "full"))
    count = TRAINED["full"]
    assert found.parts["frozen_weights"] == 0
    assert (found.parts["adapter_weights"], found.parts["optimizer_state"]) == (4 * count, 2 * 4 * count)
    assert found.all_parameters == found.trained_parameters == count
    assert found.disk["merged"] == found.disk["adapter"] == 4 * count
    assert found.phases["calibration"] == 0
    assert 4 * count < found.phases["loading"] < 5 * count + 260 * 64 * 4


def test_corda_holds_every_moment_before_training_and_none_after_a_resume(toy: Path) -> None:
    recipe = recipe_of(toy, "corda")
    found = planned(recipe)
    # Two layers' q and v, moments of 64 x 64 in fp32, beside the backbone.
    assert found.phases["calibration"] > found.phases["loading"] - 260 * 64 * 4 + 4 * 4 * 64 * 64
    again = planned(_without_calibration(recipe))
    assert again.phases == found.phases | {"calibration": 0}


@pytest.mark.parametrize("method", ["corda", "osf"])
def test_a_plan_refuses_what_training_refuses(toy: Path, method: str) -> None:
    recipe = recipe_of(toy, method, "training.deepspeed=zero3.json")
    with pytest.raises(UserError, match=r"shards them \(ZeRO-3\)"):
        plan(recipe, config_of(recipe), ranks=2, device="cpu")
    settings = {"zero_optimization": {"stage": 2}}
    assert plan(recipe, config_of(recipe), ranks=2, device="cpu", settings=settings).zero_stage == 2

"""Does it fit, what would help, and by how much; on the shipped recipes at their true shapes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from secura_ds.backbones import load_config
from secura_ds.errors import UserError
from secura_ds.plan import Devices, Plan, advice, judge, plan
from secura_ds.recipe import Recipe, SecuraAdapter, changed, load_recipe

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
SHIPPED = sorted([*RECIPES.glob("*-*b.json"), *RECIPES.glob("qlora/*.json")])
GIB = 2**30
LAYERS = {"qwen2-1.5b": 28, "qwen2-7b": 28, "gemma2-2b": 26, "llama3-8b": 32, "llama3.1-8b": 32}


def shipped(name: str, *changes: str) -> tuple[Recipe, Plan]:
    recipe = load_recipe(RECIPES / name, changes)
    ranks = 4 if recipe.training.deepspeed else 1
    return recipe, plan(recipe, load_config(recipe.backbone), ranks=ranks, device="cuda")


@pytest.fixture(scope="module")
def seven() -> tuple[Recipe, Plan]:
    return shipped("qwen2-7b.json", "training.gradient_checkpointing=false")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(RECIPES)))
def test_every_shipped_recipe_is_planned_without_a_hub_in_no_time(path: Path) -> None:
    recipe = load_recipe(path)
    load_config(recipe.backbone)  # the embedded one is converted at its first use
    began = time.process_time()
    recipe, found = shipped(str(path.relative_to(RECIPES)))
    assert time.process_time() - began < 10  # about one second on an idle core
    layers = LAYERS.get(path.stem)
    assert isinstance(recipe.adapter, SecuraAdapter)
    if layers is not None:
        assert (
            found.trained_parameters == layers * 7 * 2 * recipe.adapter.cur_rank * recipe.adapter.inner_rank
        )
    assert set(found.phases) == {"loading", "calibration", "training", "optimizer_step"}
    assert all(size >= 0 for size in found.parts.values())


def test_a_plan_fits_where_there_is_room(seven: tuple[Recipe, Plan]) -> None:
    _, found = seven
    verdict = judge(found, Devices("cuda", 4, memory=found.per_rank_bytes + GIB))
    assert verdict.fits and verdict.excess == 0 and verdict.reserve == GIB
    tight = judge(found, Devices("cuda", 4, memory=found.per_rank_bytes + GIB - 1))
    assert not tight.fits and tight.excess == 1


def test_main_memory_counts_too(seven: tuple[Recipe, Plan]) -> None:
    _, found = seven
    verdict = judge(found, Devices("cuda", 4, memory=10**12, host_memory=found.host_bytes - 7))
    assert not verdict.fits and verdict.host_excess == 7


def test_advice_frees_what_it_says_and_the_most_comes_first(seven: tuple[Recipe, Plan]) -> None:
    recipe, found = seven
    config, devices = load_config(recipe.backbone), Devices("cuda", 4, memory=6 * GIB)
    changes = advice(recipe, config, found, devices)
    assert len(changes) == 3
    assert [c.frees for c in changes] == sorted((c.frees for c in changes), reverse=True)
    assert changes[-1].frees > 0
    before = judge(found, devices).needed
    for change in changes:
        assert change.text.startswith("--set ") or change.text.startswith("twice the GPUs")
        if change.text.startswith("--set "):
            overrides = [text.strip() for text in change.text.split("--set ")[1:]]
            again = plan(changed(recipe, overrides), config, ranks=4, device="cuda")
            assert before - judge(again, devices).needed == change.frees
            assert judge(again, devices).fits == change.fits


def test_ranks_without_a_configuration_are_refused() -> None:
    recipe = load_recipe(RECIPES / "qlora" / "qwen2-7b.json")
    with pytest.raises(UserError, match=r"training.deepspeed is null.*--gpus 1.*zero3.json"):
        plan(recipe, load_config(recipe.backbone), ranks=4)

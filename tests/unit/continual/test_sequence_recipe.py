"""Recipes of task sequences: what they expand to, and what is refused, in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from continual_toys import sequence_recipe, write_sequence_toy
from training_toys import write_toy

from secura_ds.backbones import load_config
from secura_ds.continual import run_sequences
from secura_ds.continual.stage import entry_recipes
from secura_ds.errors import UserError
from secura_ds.plan.blueprint import draw
from secura_ds.recipe import (
    SequenceRecipe,
    describes_sequences,
    load_recipe,
    load_sequence_recipe,
    recipe_schema,
)

REPOSITORY = Path(__file__).resolve().parents[3]
SHIPPED = sorted((REPOSITORY / "recipes" / "continual").glob("*.json"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sequence_toy(tmp_path_factory.mktemp("toy"))


def problem(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_sequence_recipe(path, overrides)
    return str(caught.value).replace(f" ({path})", "")


def changed(path: Path, tmp_path: Path, **changes: Any) -> Path:
    values = sequence_recipe() | changes
    for key in ("task_folders",):
        values[key] = [str(path.parent / name) for name in values[key]]
    values["backbone"] = {"model": str(path.parent / "backbone"), "dtype": "float32"}
    for probe in values["evaluation"]["probes"]:
        probe["path"] = str(path.parent / probe["path"])
    new = tmp_path / "sequences.json"
    new.write_text(json.dumps(values))
    return new


def test_sequences_of_a_recipe(path: Path, tmp_path: Path) -> None:
    first = sequence_recipe()["entries"][0]
    entries = [first | {"learning_rates": [0.01, 2e-4]}, first | {"name": "er", "strategy": {"kind": "er"}}]
    new = changed(path, tmp_path, entries=entries, orders=[["sums", "sizes"], ["sizes"]], seeds=[0, 7])
    found = [(s.label, s.learning_rate, s.order, s.seed) for s in load_sequence_recipe(new).sequences()]
    assert len(found) == 2 * 2 * 2 + 2 * 2
    assert found[0] == ("secura-lr0.01-order1-seed0", 0.01, ["sums", "sizes"], 0)
    assert found[7] == ("secura-lr0.0002-order2-seed7", 2e-4, ["sizes"], 7)
    assert len({label for label, *_ in found}) == len(found)


def test_a_recipe_loads_again_as_it_was_resolved(path: Path, tmp_path: Path) -> None:
    recipe = load_sequence_recipe(path)
    (tmp_path / "again.json").write_text(json.dumps(recipe.resolved()))
    again = load_sequence_recipe(tmp_path / "again.json", [f"task_folders=[{json.dumps(str(path.parent))}]"])
    kept = {key for key in recipe.resolved() if key != "task_folders"}
    assert {key: again.resolved()[key] for key in kept} == {key: recipe.resolved()[key] for key in kept}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "entries.0.strategy.kind=ewcc",
            'entries.0.strategy.kind is "ewcc" from --set: should be one of "seq", "er", "ewc", "i-lora", '
            '"protect"; did you mean ewc?',
        ),
        ("entries.0.adapter.method=dorra", "did you mean dora?"),
        (
            'entries.0.strategy={"kind": "ewc", "penalti": 3}',
            "entries.0.strategy.penalti from --set is no known key; did you mean penalty?",
        ),
        ("entries.0.learning_rates=[]", "should have at least 1 item"),
        ("entries.0.learning_rates=[0.1,0.1]", "0.1 is given twice"),
        ("seeds=[1,1]", "1 is given twice"),
        ('orders=[["sums","summs"]]', "'summs' is not among tasks: add it there"),
        ("orders=[]", "should hold an order, or be null"),
        ('orders=[["sums"],["sums"]]', "['sums'] is given twice"),
        ('tasks=["tasks/sums.yaml"]', "'tasks/sums.yaml' is a path: give the task's name, and its folder in"),
        ('tasks=["sums.yaml"]', "'sums.yaml' is a path"),
        (
            'entries.0.strategy={"kind": "er", "buffer_size": 1}',
            "entry secura: strategy.buffer_size is 1, too few to keep an example of each of the 2 tasks",
        ),
        ("training.learning_rate=1", "training.learning_rate from --set is no known key"),
        ("training.epochs=2", "exactly one of epochs and max_steps should be given"),
        ("data.sources=[]", "data.sources from --set is no known key"),
        ("backbone.dtype=float31", "backbone.dtype is"),
    ],
)
def test_wrong_values_in_one_line(path: Path, override: str, said: str) -> None:
    found = problem(path, override)
    assert said in found and "\n" not in found


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"adapter": {"method": "secura", "strategy": "M1"}, "strategy": {"kind": "ewc"}}, 'strategy "M1"'),
        ({"adapter": {"method": "secura", "fold_every": 1}, "strategy": {"kind": "i-lora"}}, "fold_every"),
        ({"adapter": {"method": "cabr", "fold_every": 1}, "strategy": {"kind": "ewc"}}, "fold_every"),
    ],
)
def test_a_method_and_a_strategy_that_do_not_combine(
    entry: dict[str, Any], said: str, path: Path, tmp_path: Path
) -> None:
    new = changed(path, tmp_path, entries=[entry | {"name": "x", "learning_rates": [0.1]}])
    found = problem(new)
    assert f"compares parameters over time, and the adapter's {said} moves" in found
    assert 'use strategy "M2" with fold_every 0, or "er"' in found


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "lora"},
        {"method": "secura", "strategy": "M1", "selection": "least"},
        {"method": "secura", "strategy": "M1", "calibration": {"mode": "null"}},
        {"method": "secura"},
    ],
)
def test_protection_needs_factors_for_each_task(adapter: dict[str, Any], path: Path, tmp_path: Path) -> None:
    one = {"name": "x", "learning_rates": [0.1], "adapter": adapter, "strategy": {"kind": "protect"}}
    found = problem(changed(path, tmp_path, entries=[one]))
    assert (
        '"protect" acts where each task has factors of its own: use it with selection "calibrated"' in found
    )


def test_what_full_training_and_4_bit_weights_need(path: Path, tmp_path: Path) -> None:
    full = {"name": "all", "adapter": {"method": "full"}, "learning_rates": [0.1]}
    folded = {"name": "m1", "adapter": {"method": "secura", "strategy": "M1"}, "learning_rates": [0.1]}
    new = changed(path, tmp_path, entries=[full, folded])
    four_bit = ["backbone.dtype=bfloat16", "backbone.quantization.kind=nf4"]
    assert 'entry all: adapter.method is "full" and backbone.dtype "bfloat16"' in problem(new, four_bit[0])
    assert 'entry all: adapter.method is "full", which trains the weights' in problem(new, *four_bit)
    m1 = changed(path, tmp_path, entries=[folded])
    assert 'entry m1: adapter.strategy is "M1", which rewrites the weights' in problem(m1, *four_bit)


@pytest.mark.parametrize("kind", ["er", "i-lora"])
def test_packing_hides_what_is_replayed(path: Path, kind: str) -> None:
    strategy = f'entries.0.strategy={{"kind": "{kind}"}}'
    assert f'packing puts several examples into one row, in which strategy "{kind}"' in problem(
        path, strategy, "data.packing=true"
    )


def test_recipes_of_the_other_kind_name_their_command(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="describes task sequences: run it with launch/continual.py"):
        load_recipe(path)
    run = write_toy(tmp_path)
    with pytest.raises(UserError, match="describes a training run: run it with launch/train.py"):
        load_sequence_recipe(run)
    assert describes_sequences(path) and not describes_sequences(run)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": ["sums", "sizzes"]}, "sizzes"),
        ({"task_folders": ["nowhere"]}, "nowhere"),
        (
            {
                "evaluation": {
                    "probes": [{"kind": "multiple_choice", "path": "knowledge.jsonl", "max_items": 10}]
                }
            },
            "knowledge.jsonl has 9 questions, but max_items is 10: lower it, or leave it out",
        ),
        (
            {"evaluation": {"probes": [{"kind": "text_loss", "path": "general.txt", "max_items": 99}]}},
            "windows of 256 tokens, but max_items is 99",
        ),
    ],
)
def test_nothing_is_trained_for_what_cannot_be_measured(
    changes: dict[str, Any], said: str, path: Path, tmp_path: Path
) -> None:
    new = changed(path, tmp_path, **changes)
    recipe = load_sequence_recipe(new, [f"output_dir={tmp_path / 'results'}"])
    with pytest.raises(UserError, match=said):
        run_sequences(recipe)
    assert not (tmp_path / "results" / "sequences").exists()


def test_the_schema_in_the_repository_is_current() -> None:
    written = json.loads((REPOSITORY / "recipes" / "sequence.schema.json").read_text())
    assert written == recipe_schema(SequenceRecipe)


def test_recipes_are_shipped() -> None:
    assert SHIPPED


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load(shipped: Path) -> None:
    recipe = load_sequence_recipe(shipped)
    assert recipe.name == shipped.stem and recipe.description
    assert recipe.output_dir == f"runs/{recipe.name}"


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.stem)
def test_entries_of_a_comparison_train_as_much_within_ten_percent(shipped: Path, tmp_path: Path) -> None:
    recipe = load_sequence_recipe(shipped)
    config = load_config(recipe.backbone)
    trained = {}
    for entry, first in entry_recipes(recipe, tmp_path):
        parameters = draw(first, config, sharded=False).parameters()
        trained[entry.name] = sum(p.numel() for p in parameters if p.requires_grad)
    assert max(trained.values()) <= 1.1 * min(trained.values()), trained

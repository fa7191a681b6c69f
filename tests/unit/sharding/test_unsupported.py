"""DeepSpeed settings that cannot work are refused by name, all at once; the shipped ones are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_toys import write_toy

from secura_ds.errors import UserError
from secura_ds.recipe import load_recipe
from secura_ds.sharding import refuse_unsupported
from secura_ds.training import preflight

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
REFUSED: list[tuple[str, Any, str]] = [
    ("zero_optimization.offload_param.device", "nvme", 'must be memory; use "cpu"'),
    ("zero_optimization.offload_optimizer.device", "nvme", 'read and restored in memory; use "cpu"'),
    ("zero_optimization.zero_quantized_weights", True, "8 bits whenever they are gathered.*; remove it"),
    (
        "zero_optimization.zero_quantized_nontrainable_weights",
        True,
        "remove it and set backbone.quantization",
    ),
    ("zero_optimization.zero_quantized_gradients", True, "round gradients .*; remove it"),
    ("zero_optimization.zero_hpz_partition_size", 8, "second copy of the weights .*; remove it"),
    ("zero_optimization.mics_shard_size", 4, "MiCS would cut weights .*; remove it"),
    ("zero_optimization.mics_hierarchical_params_gather", True, "MiCS would cut weights .*; remove it"),
    ("tensor_parallel.autotp_size", 2, "tensor parallelism .*; remove tensor_parallel"),
    ("tensor_parallel.tp.tp_size", 2, "tensor parallelism .*; remove tensor_parallel"),
]


def settings_with(*places: tuple[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {"zero_optimization": {"stage": 3}}
    for place, value in places:
        *sections, key = place.split(".")
        section = settings
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    return settings


@pytest.mark.parametrize(("place", "value", "message"), REFUSED)
def test_refused_by_name_with_reason_and_remedy(place: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^zero3.json: {place} is {value!r}: .*{message}") as error:
        refuse_unsupported(settings_with((place, value)), "zero3.json")
    assert "\n" not in str(error.value)


def test_all_are_named_at_once() -> None:
    with pytest.raises(UserError) as error:
        refuse_unsupported(settings_with(*((place, value) for place, value, _ in REFUSED)), "zero3.json")
    assert all(place in str(error.value) for place, _, _ in REFUSED)


@pytest.mark.parametrize("value", [None, False, "auto", 0, -1, "cpu", "none"])
def test_values_that_turn_a_setting_off_are_in_order(value: Any) -> None:
    refuse_unsupported(settings_with(*((place, value) for place, _, _ in REFUSED)), "zero3.json")


def test_a_group_of_one_rank_is_in_order() -> None:
    sizes = [place for place, value, _ in REFUSED if value in (2, 8)]
    assert len(sizes) == 3
    refuse_unsupported(settings_with(*((place, 1) for place in sizes)), "zero3.json")


def test_odd_sections_do_not_break_the_check() -> None:
    refuse_unsupported({"zero_optimization": True, "tensor_parallel": None}, "zero3.json")


def test_a_run_stops_before_it_loads_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_toy(tmp_path)
    (tmp_path / "zero++.json").write_text(json.dumps(settings_with(REFUSED[2][:2])))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"zero\+\+.json: zero_optimization.zero_quantized_weights is True"):
        preflight.deepspeed_settings(load_recipe(recipe, ["training.deepspeed=zero++.json"]))


@pytest.mark.parametrize("path", sorted((RECIPES / "deepspeed").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configurations_are_supported(path: Path) -> None:
    refuse_unsupported(json.loads(path.read_text()), str(path))

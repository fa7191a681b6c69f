"""The memory check at the start of a run: what it compares, and what each setting of it does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from training_toys import write_toy

from secura_ds.errors import UserError
from secura_ds.plan import Devices, Work
from secura_ds.recipe import Recipe, load_recipe
from secura_ds.training import memory
from secura_ds.training.memory import check_memory, largest_pass

MIB = 2**20


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def rows() -> Dataset:
    """Rows of 3, 50 and 20 tokens, with 1, 10 and 15 of them learnt."""
    sizes = ((3, 1), (50, 10), (20, 15))
    labels = [[-100] * (length - learnt) + [5] * learnt for length, learnt in sizes]
    return Dataset.from_dict({"input_ids": [[7] * length for length, _ in sizes], "labels": labels})


def recipe_of(toy: Path, *changes: str) -> Recipe:
    return load_recipe(toy, ["data.max_length=64", *changes])


def machine(monkeypatch: pytest.MonkeyPatch, size: int, host: int = 2**40) -> None:
    monkeypatch.setattr(memory, "here", lambda **_: Devices("cpu", 1, 1, size, host))


def needed(toy: Path, rows: Dataset, *changes: str) -> int:
    planned = check_memory(recipe_of(toy, *changes), rows, None)
    assert planned is not None
    return planned.per_rank_bytes


def test_the_largest_pass_is_made_of_the_longest_rows(toy: Path, rows: Dataset) -> None:
    assert largest_pass(rows, recipe_of(toy)) == Work(2, 50, 25, padded=True)
    assert largest_pass(rows, recipe_of(toy, "training.micro_batch_size=1")) == Work(1, 50, 15, padded=False)
    assert largest_pass(rows, recipe_of(toy, "training.micro_batch_size=9")) == Work(3, 50, 26, padded=True)
    packed = largest_pass(rows, recipe_of(toy, "data.packing=true"))
    assert packed == Work(1, 70, 25, padded=False, packed=True)


def test_the_plan_is_of_the_data_not_of_the_longest_row_allowed(toy: Path, rows: Dataset) -> None:
    short = rows.select([0, 2]).flatten_indices()
    assert needed(toy, short) < needed(toy, rows)
    assert needed(toy, rows, "data.max_length=5000") == needed(toy, rows)


@pytest.mark.parametrize(
    ("share", "check", "outcome"),
    [
        (1.01, "refuse", "starts"),
        (0.95, "refuse", "warns"),
        (0.85, "refuse", "refuses"),
        (0.1, "warn", "warns"),
        (0.1, "off", "starts"),
    ],
)
def test_refused_only_beyond_what_a_plan_may_be_off(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    toy: Path,
    rows: Dataset,
    share: float,
    check: str,
    outcome: str,
) -> None:
    machine(monkeypatch, int(share * needed(toy, rows)))
    recipe = recipe_of(toy, f"training.memory_check={check}")
    caplog.set_level(logging.WARNING)
    caplog.clear()
    if outcome == "refuses":
        with pytest.raises(UserError) as refused:
            check_memory(recipe, rows, None)
        line = str(refused.value)
    else:
        planned = check_memory(recipe, rows, None)
        assert (planned is None) == (check == "off")
        line = caplog.text
    assert ("memory is short" in line) == (outcome != "starts")
    assert "\n" not in line.strip()
    if outcome != "starts":
        assert "GiB per process" in line and "try --set " in line and "which frees" in line


def test_main_memory_is_checked_too(monkeypatch: pytest.MonkeyPatch, toy: Path, rows: Dataset) -> None:
    size = needed(toy, rows)
    machine(monkeypatch, 2 * size, host=size // 2)
    with pytest.raises(UserError, match="main memory is short: this run needs .* GiB are available"):
        check_memory(recipe_of(toy), rows, None)


def test_the_scarcest_rank_decides_for_all(monkeypatch: pytest.MonkeyPatch, toy: Path, rows: Dataset) -> None:
    size = needed(toy, rows)
    machine(monkeypatch, 2 * size)
    monkeypatch.setattr(memory, "from_all", lambda own: [own, (size // 2, own[1])])
    with pytest.raises(UserError, match="memory is short"):
        check_memory(recipe_of(toy), rows, None)


def test_what_cannot_be_planned_is_trained(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, toy: Path, rows: Dataset
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise NotImplementedError("aten::strange: no kernel on the meta device")

    monkeypatch.setattr(memory, "plan", fails)
    assert check_memory(recipe_of(toy), rows, None) is None
    assert "cannot be planned (aten::strange" in caplog.text


def test_buffers_that_a_cpu_never_provides_do_not_count(
    monkeypatch: pytest.MonkeyPatch, toy: Path, rows: Dataset
) -> None:
    """DeepSpeed's default reduce bucket has 2 GB, of which a toy's gradients fill a few KiB."""
    machine(monkeypatch, 64 * MIB)
    settings = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    planned = check_memory(recipe_of(toy, "adapter.selection=calibrated"), rows, settings)
    assert planned is not None and planned.untouched > 1900 * 10**6
    assert planned.phases["calibration"] <= planned.needed_bytes < 64 * MIB


def test_a_resumed_run_does_not_calibrate(toy: Path, rows: Dataset) -> None:
    recipe = recipe_of(toy, "adapter.selection=calibrated")
    anew, resumed = (check_memory(recipe, rows, None, calibrates=again) for again in (True, False))
    assert anew is not None and resumed is not None
    assert anew.phases["calibration"] > 0 == resumed.phases["calibration"]
    assert {k: v for k, v in anew.phases.items() if k != "calibration"}.items() <= resumed.phases.items()


def test_contrast_holds_more_than_inputs_alone(toy: Path, rows: Dataset) -> None:
    text = toy.parent / "text.txt"
    text.write_text("Bread and butter. " * 40)
    options = ["adapter.selection=calibrated", f"adapter.calibration.text={text}"]
    alone, both = (
        check_memory(recipe_of(toy, *options, f"adapter.calibration.mode={mode}"), rows, None)
        for mode in ("rows", "contrast")
    )
    assert alone is not None and both is not None
    assert both.phases["calibration"] > alone.phases["calibration"]

"""The results folder of task sequences: when it may be used again, and by which recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secura_ds import environment
from secura_ds.continual.places import OWN
from secura_ds.errors import UserError
from secura_ds.files import atomic_write_json
from secura_ds.recipe import SequenceRecipe
from secura_ds.training import folder as runs

RECIPE = "recipe.resolved.json"
# What may change without making the sequences other ones. Entries, rates, orders and seeds may be added.
_FREE = {"name", "description", "output_dir", "task_folders", "seeds"}
_FREE_IN_TRAINING = {
    "deepspeed", "gradient_checkpointing", "activation_offloading", "memory_check", "logging_steps",
    "save_steps", "save_total_limit", "report_to",
}  # fmt: skip


def check(recipe: SequenceRecipe, folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse `folder` because of what lies there; changes nothing. Main process only.

    Raises:
        UserError: it holds earlier sequences and neither `resume` nor `overwrite` is set, or both are; those
            are of another recipe; or it holds a training run.
    """
    if resume and overwrite:
        raise UserError(
            "--resume continues what is in the output folder, --overwrite deletes it: give one of them"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file: choose a folder")
    if (run := runs.describe(folder)) is not None:
        raise UserError(f"output_dir {folder} holds {run} of launch/train.py: choose another folder")
    if not any((folder / name).exists() for name in (RECIPE, "before.json", "sequences")) or overwrite:
        return
    if not resume:
        raise UserError(
            f"output_dir {folder} already holds task sequences: --resume continues them, --overwrite deletes "
            "them and starts anew"
        )
    _check_same_recipe(folder / RECIPE, recipe.resolved())


def open_folder(recipe: SequenceRecipe, folder: Path, *, overwrite: bool, alone: bool = True) -> None:
    """Claim a folder that `check` allows, and write down what is run. Main process only.

    Args:
        alone: no other run works in the folder, so that unfinished files are left-overs.
    """
    if overwrite:
        for name in OWN:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    if alone:
        _remove_left_overs(folder)
    atomic_write_json(folder / RECIPE, recipe.resolved())
    atomic_write_json(folder / "environment.json", environment.describe_environment())


def _remove_left_overs(folder: Path) -> None:
    """Delete what killed writes left, but not the parts of a measurement that goes on."""
    for place in (folder, folder / "tasks", *folder.glob("sequences/*/*")):
        for left_over in place.glob(".*.partial"):
            if left_over.is_file() and not left_over.name.endswith(".json.partial"):
                left_over.unlink()


def _check_same_recipe(earlier: Path, settings: dict[str, Any]) -> None:
    try:
        before = _without_places(dict(json.loads(earlier.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"--resume: {earlier} is missing or damaged, so that nobody knows what was run there: --overwrite"
        ) from error
    for key, old, new in _conflicts(before, _without_places(settings)):
        raise UserError(
            f"--resume: {key} is {json.dumps(new)}, but the sequences in {earlier.parent} were started with "
            f"{json.dumps(old)}: use the recipe they were started with, another output_dir, or --overwrite"
        )


def _without_places(settings: dict[str, Any]) -> dict[str, Any]:
    """Probes by their file's name: the folder holds what they were (`write_material` compares it)."""
    evaluation = settings.get("evaluation", {})
    probes = [{**probe, "path": Path(probe["path"]).name} for probe in evaluation.get("probes", [])]
    return settings | {"evaluation": evaluation | {"probes": probes}}


def _conflicts(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    old: Any
    new: Any
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if key in _FREE or old == new:
            continue
        if key == "entries":
            known = {entry["name"]: entry for entry in old}
            for entry in new:
                same = known.get(entry["name"], entry)
                for part in ("adapter", "strategy"):
                    if same[part] != entry[part]:
                        yield f"entry {entry['name']}: {part}", same[part], entry[part]
        elif key == "orders":
            pairs = zip(old or [before["tasks"]], new or [after["tasks"]], strict=False)
            yield from (("orders", a, b) for a, b in pairs if a != b)
        elif isinstance(old, dict) and isinstance(new, dict):
            free = _FREE_IN_TRAINING if key == "training" else {"batch_size"}
            names = sorted((old.keys() | new.keys()) - free)
            yield from ((f"{key}.{n}", old.get(n), new.get(n)) for n in names if old.get(n) != new.get(n))
        else:
            yield key, old, new

"""The results folder of task sequences: when it may be used again, and by which recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secura_ds import environment
from secura_ds.continual.places import OWN, sequence_folder
from secura_ds.errors import UserError
from secura_ds.files import atomic_write_json
from secura_ds.recipe import Sequence, SequenceRecipe
from secura_ds.recipe.moved import same_setting
from secura_ds.training import folder as runs

RECIPE = "recipe.resolved.json"
SEQUENCE = "sequence.json"
# What may change without making the sequences other ones; entries and orders are looked up at each.
_FREE = {"name", "description", "output_dir", "task_folders", "seeds", "entries", "orders"}
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
    _check_same_recipe(folder / RECIPE, _resolved(recipe, folder))
    for sequence in recipe.sequences():
        _check_same_sequence(sequence, folder)


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
    atomic_write_json(folder / RECIPE, _resolved(recipe, folder))
    atomic_write_json(folder / "environment.json", environment.describe_environment())


def open_sequence(sequence: Sequence, folder: Path) -> None:
    """Write down what a sequence of the folder is. Main process only."""
    described = _described(sequence) | {"folder": str(folder)}
    atomic_write_json(sequence_folder(folder, sequence) / SEQUENCE, described)


def _remove_left_overs(folder: Path) -> None:
    """Delete what killed writes left, but not the parts of a measurement that goes on."""
    for place in (folder, folder / "tasks", *folder.glob("sequences/*/*")):
        for left_over in place.glob(".*.partial"):
            if left_over.is_file() and not left_over.name.endswith(".json.partial"):
                left_over.unlink()


def _resolved(recipe: SequenceRecipe, folder: Path) -> dict[str, Any]:
    return recipe.resolved() | {"output_dir": str(folder)}


def _check_same_recipe(earlier: Path, settings: dict[str, Any]) -> None:
    try:
        before = _without_places(dict(json.loads(earlier.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"--resume: {earlier} is missing or damaged, so that nobody knows what was run there: --overwrite"
        ) from error
    there, here = before.get("output_dir"), settings["output_dir"]
    for key, old, new in _conflicts(before, _without_places(settings)):
        if not same_setting(old, new, there, here):
            raise _another(key, old, new, earlier.parent)


def _check_same_sequence(sequence: Sequence, folder: Path) -> None:
    try:
        earlier = (sequence_folder(folder, sequence) / SEQUENCE).read_text(encoding="utf-8")
        before = dict(json.loads(earlier))
    except (OSError, ValueError, TypeError):
        return  # not begun
    for key, new in _described(sequence).items():
        if not same_setting(before.get(key), new, before.get("folder"), str(folder)):
            what = "orders" if key == "order" else f"entry {sequence.entry.name}: {key}"
            raise _another(what, before.get(key), new, folder)


def _described(sequence: Sequence) -> dict[str, Any]:
    """What its label does not tell."""
    settings = sequence.entry.model_dump(mode="json", include={"adapter", "strategy"})
    return settings | {"order": sequence.order}


def _another(key: str, old: Any, new: Any, folder: Path) -> UserError:
    return UserError(
        f"--resume: {key} is {json.dumps(new)}, but the sequences in {folder} were started with "
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
        if isinstance(old, dict) and isinstance(new, dict):
            free = _FREE_IN_TRAINING if key == "training" else {"batch_size"}
            names = sorted((old.keys() | new.keys()) - free)
            yield from ((f"{key}.{n}", old.get(n), new.get(n)) for n in names if old.get(n) != new.get(n))
        else:
            yield key, old, new

"""The folder of a run: which files are its own, and when it may be used again."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from secura_ds.data import DataReport
from secura_ds.errors import UserError
from secura_ds.files import explained, remove_left_overs
from secura_ds.reading import read_json_object
from secura_ds.recipe.moved import same_setting

logger = logging.getLogger(__name__)

MERGED = "merged"
MODEL = "model"
OWN_FILES = (
    "adapter", MODEL, "checkpoints", "logs", "metrics.jsonl", "statistics.jsonl", "calibration.jsonl",
    "run.json", "recipe.resolved.json", "environment.json", "data.json", "evaluation.before.json",
    "evaluation.after.json", "merge.json", "report.html", "plots",
    MERGED, f"{MERGED}.partial", f".{MERGED}.partial.lock",
)  # fmt: skip
# What may differ between a run and its continuation without making it another run.
FREE_SETTINGS = ("name", "description", "training", "evaluation")


def check(folder: Path, *, resume: bool, overwrite: bool, reads: Sequence[Path] = ()) -> None:
    """Refuse `folder` because an earlier run lies there; changes nothing. Main process only.

    Args:
        reads: files and folders that the new run needs.

    Raises:
        UserError: the folder holds a run and neither `resume` nor `overwrite` is set, or both are, or
            `overwrite` would delete what the new run reads.
    """
    own = [(folder / name).resolve() for name in OWN_FILES]
    for needed in reads if overwrite else ():
        if any(needed.resolve().is_relative_to(path) for path in own):
            raise UserError(f"the recipe reads {needed}, which --overwrite would delete: move it elsewhere")
    if resume and overwrite:
        raise UserError(
            "--resume continues the run in the output folder, --overwrite deletes it: give one of them"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"training.output_dir {folder} is a file: choose a folder")
    state = describe(folder)
    if state is not None and not (resume or overwrite):
        raise UserError(
            f"training.output_dir {folder} already holds {state}: "
            "--resume continues it, --overwrite deletes it and starts anew"
        )


def claim(folder: Path, *, overwrite: bool) -> None:
    """Make `folder` ready for a run that `check` allows. Main process only."""
    if overwrite:
        remove_run(folder)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").unlink(missing_ok=True)
    remove_left_overs(folder)
    remove_left_overs(folder / "checkpoints")


def describe(folder: Path) -> str | None:
    """What earlier run lies in `folder`, in words; None if there is none."""
    try:
        status = json.loads((folder / "run.json").read_text(encoding="utf-8")).get("status")
        return f"a run (status {status})"
    except (OSError, ValueError, AttributeError):
        pass
    if any((folder / name).is_dir() for name in ("adapter", MODEL)) or any(folder.glob("checkpoints/step-*")):
        return "a run that was cut off"
    return None


def remove_run(folder: Path) -> None:
    """Delete the files of an earlier run, and nothing else that lies in the folder."""
    for name in OWN_FILES:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def check_same_run(earlier: Path, settings: dict[str, Any]) -> None:
    """Refuse to continue a run whose backbone, adapter or data were other ones.

    Files that lie to the run's folder as they did are the same ones: both were moved together.

    Args:
        earlier: `recipe.resolved.json` of the run that is continued; without it nothing is checked.

    Raises:
        UserError: names the first setting that differs.
    """
    try:
        before = json.loads(earlier.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    there, here = (recipe.get("training", {}).get("output_dir") for recipe in (before, settings))
    for key, old, new in _differences(before, settings, ""):
        if same_setting(old, new, there, here):
            continue
        section = key.split(".")[0]
        if section not in FREE_SETTINGS:
            raise UserError(
                f"--resume: {key} is {json.dumps(new)}, but the run in {earlier.parent} was started with "
                f"{json.dumps(old)}: use the recipe it was started with, or --overwrite"
            )
        if section == "training":
            logger.warning("--resume: %s was %s and is now %s", key, json.dumps(old), json.dumps(new))


def check_same_data(earlier: Path, data: DataReport) -> None:
    """Refuse to continue a run whose examples said something else, under the same name.

    Args:
        earlier: `data.json` of the run that is continued; without it nothing is checked.

    Raises:
        UserError: names the first source that has changed.
    """
    try:
        before = [source["sha256"] for source in read_json_object(earlier)["sources"]]
    except (UserError, TypeError, KeyError):
        return
    for old, source in zip(before, data.sources, strict=False):
        if old != source.sha256:
            raise UserError(
                f"--resume: the examples of {source.name} are not those that the run in {earlier.parent} was "
                "started with: put the earlier ones back, or use --overwrite"
            )


def _differences(before: Any, after: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in {**before, **after}:
            yield from _differences(before.get(name), after.get(name), f"{key}.{name}" if key else name)
    elif before != after:
        yield key, before, after

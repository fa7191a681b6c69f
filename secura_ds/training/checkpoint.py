"""Checkpoints on disk: whole tensors by name, so that any number of ranks can go on from them.

A run keeps `checkpoints/factors.safetensors`, the frozen C and R, once; each `checkpoints/step-000100/` has

    trained.safetensors    trained parameters (fp32), U, and weights that M1 has folded
    optimizer.safetensors  `<parameter>/<key>`
    trainer_state.json     the Trainer's own state: step, epoch, log
    state.json             the rest: schedule, counters, random numbers of every rank
    manifest.json          size and SHA-256 of every other file

A checkpoint is written into another folder, the manifest last, and then renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from secura_ds.errors import UserError
from secura_ds.files import atomic_folder, atomic_write_json, atomic_write_text, save_tensors

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"


@dataclass
class Checkpoint:
    """Everything needed to go on from a step, in memory."""

    trained: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    trainer_state: str


def folder_of(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint of one step."""
    return checkpoints / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def write(checkpoints: Path, step: int, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write one checkpoint, then remove all but the newest `keep`. Main process only.

    Raises:
        UserError: the disk is full; the earlier checkpoints are as they were.
    """
    path = folder_of(checkpoints, step)
    with atomic_folder(path, overwrite=True) as partial:
        save_tensors(partial / "trained.safetensors", checkpoint.trained)
        save_tensors(partial / "optimizer.safetensors", checkpoint.optimizer)
        atomic_write_json(partial / "state.json", checkpoint.state)
        atomic_write_text(partial / TRAINER_STATE, checkpoint.trainer_state)
        atomic_write_json(
            partial / "manifest.json", {p.name: _fingerprint(p) for p in sorted(partial.iterdir())}
        )
    for old in _newest_first(checkpoints)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def read(path: Path) -> Checkpoint:
    """Read a checkpoint that `latest` found."""
    return Checkpoint(
        trained=load_file(path / "trained.safetensors"),
        optimizer=load_file(path / "optimizer.safetensors"),
        state=json.loads((path / "state.json").read_text(encoding="utf-8")),
        trainer_state=(path / TRAINER_STATE).read_text(encoding="utf-8"),
    )


def latest(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose files are all as its manifest says; damaged ones are named in a warning."""
    for path in _newest_first(checkpoints):
        damage = damage_of(path)
        if damage is None:
            return path
        logger.warning("%s is damaged (%s): using the checkpoint before it", path, damage)
    return None


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is whole."""
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "no readable manifest.json"
    for name, fingerprint in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _fingerprint(path / name) != fingerprint:
            return f"{name} was changed or cut off"
    return None


def write_factors(checkpoints: Path, factors: Mapping[str, Tensor]) -> None:
    """Write the frozen factors of a run, which no checkpoint repeats. Main process only."""
    if factors:
        save_tensors(checkpoints / "factors.safetensors", factors)


def read_factors(checkpoints: Path) -> dict[str, Tensor]:
    """The frozen factors of a run; empty for adapters that have none.

    Raises:
        UserError: the file is damaged.
    """
    path = checkpoints / "factors.safetensors"
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except Exception as error:
        raise UserError(f"{path} is damaged ({error}): start the run anew with --overwrite") from error


def _newest_first(checkpoints: Path) -> list[Path]:
    return sorted((p for p in checkpoints.glob("step-*") if p.name[5:].isdigit()), key=step_of, reverse=True)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

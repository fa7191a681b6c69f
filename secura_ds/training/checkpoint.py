"""Checkpoints on disk: whole tensors by name, so that any number of ranks can go on from them.

A run keeps `checkpoints/factors.safetensors`, the frozen C and R, once; each `checkpoints/step-000100/` has

    trained.safetensors          trained parameters (fp32) and U
    optimizer.safetensors        `<parameter>/<key>`
    folded-00001.safetensors ... weights that M1 has folded, up to a gigabyte a file
    trainer_state.json           the Trainer's own state: step, epoch, log
    state.json                   the rest: schedule, counters, random numbers of every rank
    manifest.json                size and SHA-256 of every other file and of the run's factors, and its own

A checkpoint is written into another folder, the manifest last, and then renamed. It counts if every file is
as the manifest says; otherwise the one before it does.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from secura_ds.errors import UserError
from secura_ds.files import (
    atomic_folder,
    atomic_write_json,
    atomic_write_text,
    remove_folder,
    save_tensors,
    swap_folder,
)

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
FACTORS = "factors.safetensors"
REQUIRED = {"trained.safetensors", "optimizer.safetensors", TRAINER_STATE, "state.json"}
FORMAT = 2

Fingerprint = dict[str, Any]
"""`{"bytes": ..., "sha256": ...}` of a file."""


@dataclass
class Checkpoint:
    """Everything needed to go on from a step, in memory, but for the weights that M1 has folded."""

    trained: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    trainer_state: str


class Draft:
    """A checkpoint that is being written, in a folder not yet under its name. Main process only."""

    def __init__(self, place: Path) -> None:
        self._place, self._files = place, 0

    def add_folded(self, weights: Mapping[str, Tensor]) -> None:
        """Write one more file of weights that M1 has folded, by the name of the weight in the model."""
        self._files += 1
        save_tensors(self._place / f"folded-{self._files:05d}.safetensors", weights)

    def finish(self, checkpoint: Checkpoint, factors: Fingerprint | None) -> str:
        """Write everything else, the manifest last.

        Returns:
            How large it is, in words.
        """
        save_tensors(self._place / "trained.safetensors", checkpoint.trained)
        save_tensors(self._place / "optimizer.safetensors", checkpoint.optimizer)
        atomic_write_json(self._place / "state.json", checkpoint.state)
        atomic_write_text(self._place / TRAINER_STATE, checkpoint.trainer_state)
        files = {path.name: fingerprint(path) for path in sorted(self._place.iterdir())}
        manifest = {"format": FORMAT, "files": files, "factors": factors}
        atomic_write_json(self._place / "manifest.json", {**manifest, "sha256": _digest(manifest)})
        folded = sum(size["bytes"] for name, size in files.items() if name.startswith("folded-"))
        rest = sum(size["bytes"] for size in files.values()) - folded
        return f"{rest / 1e6:.1f} MB" + (f", and {folded / 1e6:.1f} MB of folded weights" if folded else "")


@contextmanager
def draft(checkpoints: Path, step: int, *, keep: int) -> Iterator[Draft]:
    """A checkpoint that takes its name once the block has ended well, and all but `keep` older ones go.

    A whole checkpoint of the same step, which a run writes that is interrupted just after it has saved,
    stays as it is.

    Raises:
        UserError: the disk is full; the earlier checkpoints are as they were.
    """
    path = folder_of(checkpoints, step)
    with atomic_folder(path, overwrite=True, replaces=lambda: damage_of(path) is not None) as place:
        yield Draft(place)
    for old in _newest_first(checkpoints)[keep:]:
        remove_folder(old)


def folder_of(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint of one step."""
    return checkpoints / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def read(path: Path) -> Checkpoint:
    """Read a checkpoint that `latest` found."""
    return Checkpoint(
        trained=load_file(path / "trained.safetensors"),
        optimizer=load_file(path / "optimizer.safetensors"),
        state=json.loads((path / "state.json").read_text(encoding="utf-8")),
        trainer_state=(path / TRAINER_STATE).read_text(encoding="utf-8"),
    )


def read_folded(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights that M1 has folded, one after another, by the name of the weight in the model."""
    for file in sorted(path.glob("folded-*.safetensors")):
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def latest(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose files are all as its manifest says; damaged ones are named in a warning."""
    for path in _newest_first(checkpoints):
        damage = damage_of(path)
        if damage is None:
            return path
        logger.warning("%s is damaged (%s): using the checkpoint before it", path, damage)
    return None


def set_aside_after(checkpoints: Path, step: int) -> None:
    """Rename checkpoints of later steps than the one a run goes on from to `damaged-...`.

    They must not count among those that are kept; what is in them may still be of use to someone.
    """
    for path in _newest_first(checkpoints):
        if step_of(path) > step:
            swap_folder(path, path.with_name(f"damaged-{path.name}"))


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is whole."""
    try:
        manifest = _manifest(path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return "manifest.json is missing or was changed"
    if manifest["format"] != FORMAT:
        return f"of format {manifest['format']}, where this version writes {FORMAT}"
    files = manifest["files"]
    for name in sorted(REQUIRED - files.keys()):
        return f"its manifest lacks {name}"
    for name, expected in files.items():
        if Path(name).name != name or not (path / name).is_file():
            return f"{name} is missing"
        if fingerprint(path / name) != expected:
            return f"{name} was changed or cut off"
    return None


def factors_of(path: Path) -> Fingerprint | None:
    """The fingerprint of the factors that a whole checkpoint belongs to; None for adapters that have none."""
    factors: Fingerprint | None = _manifest(path)["factors"]
    return factors


def write_factors(checkpoints: Path, factors: Mapping[str, Tensor]) -> Fingerprint | None:
    """Write the frozen factors of a run, which no checkpoint repeats. Main process only.

    Returns:
        What every checkpoint notes of them; None for adapters that have none.
    """
    if not factors:
        return None
    save_tensors(checkpoints / FACTORS, factors)
    return fingerprint(checkpoints / FACTORS)


def has_factors(checkpoints: Path, expected: Fingerprint | None) -> bool:
    """Whether the factors that a checkpoint notes are there and whole; also where it notes none."""
    path = checkpoints / FACTORS
    return expected is None or (path.is_file() and fingerprint(path) == expected)


def read_factors(checkpoints: Path, expected: Fingerprint | None) -> dict[str, Tensor]:
    """The frozen factors of a run, which `has_factors` has found whole; empty for adapters that have none."""
    return load_file(checkpoints / FACTORS) if expected is not None else {}


def mend_factors(checkpoints: Path, factors: Mapping[str, Tensor], expected: Fingerprint) -> None:
    """Write factors that were made anew in place of a damaged file. Main process only.

    Raises:
        UserError: they are not the ones that the run was started with.
    """
    if write_factors(checkpoints, factors) != expected:
        raise UserError(
            f"{checkpoints / FACTORS} is missing or damaged, and what was chosen anew differs from it "
            "(another number of ranks or another machine rounds otherwise): copy the file back from "
            "elsewhere, or start anew with --overwrite"
        )


def fingerprint(path: Path) -> Fingerprint:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _manifest(path: Path) -> dict[str, Any]:
    """Format, files and factors, as they were written; raises one of many errors if they were not."""
    manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    if manifest.pop("sha256") != _digest(manifest) or not {"format", "files", "factors"} <= manifest.keys():
        raise ValueError
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _newest_first(checkpoints: Path) -> list[Path]:
    return sorted((p for p in checkpoints.glob("step-*") if p.name[5:].isdigit()), key=step_of, reverse=True)

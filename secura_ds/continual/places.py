"""Where the parts of a results folder lie, and what they are called.

recipe.resolved.json, environment.json, continual.json, report.html
tasks/<task>.train.jsonl, .validation.jsonl, .held-out.jsonl     what is learnt and scored
probes/<probe>                                                   a copy of each probe's file
calibration/                                                     its text and factors, shared by sequences
before.json                                                      the untouched backbone
sequences/<label>/sequence.json                                  what it is, and where it began
sequences/<label>/stages/01-<task>/                              a run folder of each task
sequences/<label>/scores/01-<task>.json                          what was measured after it
sequences/<label>/strategy/01-<task>.buffer.jsonl, .safetensors  what the strategy carries on
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from secura_ds.recipe import CabrSettings, CordaAdapter, Protection, Sequence
from secura_ds.training.shared import SharedCalibration

OWN = (
    "recipe.resolved.json",
    "environment.json",
    "continual.json",
    "report.html",
    "plots",
    "tasks",
    "probes",
    "calibration",
    "before.json",
    ".before.json.partial",
    "sequences",
)


@dataclass(frozen=True)
class TaskFiles:
    """The files of one task: examples to learn, to choose a learning rate on, and to score."""

    train: Path
    validation: Path
    held_out: Path


def task_files(folder: Path, task: str) -> TaskFiles:
    """The files of a task in a results folder."""
    name = folder / "tasks" / task
    return TaskFiles(
        *(name.with_name(f"{task}.{part}.jsonl") for part in ("train", "validation", "held-out"))
    )


def probe_file(folder: Path, path: str) -> Path:
    """The copy in a results folder of the probe that a recipe has at `path`."""
    return folder / "probes" / Path(path).name


def shared_calibration(folder: Path, sequence: Sequence, number: int) -> SharedCalibration | None:
    """Where sequences share what calibration makes for the task at position `number`; None without one."""
    adapter = sequence.entry.adapter
    if not isinstance(adapter, CabrSettings | CordaAdapter):
        return None
    if isinstance(adapter, CabrSettings) and adapter.selection != "calibrated":
        return None
    settings, place = adapter.calibration, folder / "calibration"
    factors = place / sequence.entry.name / f"{sequence.order[number]}-seed{sequence.seed}.safetensors"
    after_others = number > 0 and isinstance(sequence.entry.strategy, Protection)
    return SharedCalibration(
        factors=None if after_others else factors,
        text=None if settings.text is not None else place / f"{settings.num_tokens}-{settings.seed}.jsonl",
    )


@dataclass(frozen=True)
class StagePlaces:
    """The places of one task of one sequence."""

    run: Path
    scores: Path
    buffer: Path
    anchors: Path

    def finished(self) -> bool:
        """Whether the task was trained and measured: both left their record."""
        return self.scores.is_file() and (self.run / "run.json").is_file()


def stage_places(folder: Path, sequence: Sequence, number: int) -> StagePlaces:
    """The places of the task at position `number`, from 0, of a sequence."""
    base = sequence_folder(folder, sequence)
    name = f"{number + 1:02d}-{sequence.order[number]}"
    return StagePlaces(
        run=base / "stages" / name,
        scores=base / "scores" / f"{name}.json",
        buffer=base / "strategy" / f"{name}.buffer.jsonl",
        anchors=base / "strategy" / f"{name}.safetensors",
    )


def sequence_folder(folder: Path, sequence: Sequence) -> Path:
    """The folder of a sequence."""
    return folder / "sequences" / sequence.label

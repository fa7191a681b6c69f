"""The results folder of task sequences, read back and checked (docs/continual-results.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from secura_ds.errors import UserError, shown
from secura_ds.reading import read_json_object

DOCUMENT = "continual.json"
DEPTH = 8
REMEDY = "let launch/continual.py write it again"

Name = Annotated[str, Field(min_length=1, max_length=200)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(ge=0, le=1e12)]
Number = Annotated[float, Field(ge=-1e6, le=1e6)]
"""A score or a loss. Nothing near the largest float, whose square would overflow."""

Status = Literal["finished", "unfinished"]


class _Part(BaseModel):
    """Keys that a later version adds are passed over; those it has must be right."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


class Task(_Part):
    """One task of the document. `maximum` and `chance` are in the unit of its scores."""

    name: Name
    metric: Name
    maximum: Annotated[float, Field(gt=0, le=1e6)]
    chance: Number = 0.0
    items: Count


class Probe(_Part):
    """One retention probe: scores are shares of right answers, or mean token losses in nats."""

    name: Name
    kind: Literal["multiple_choice", "text_loss"]
    chance: Annotated[float, Field(ge=0, lt=1)] | None = None
    items: Count


class TaskScore(_Part):
    """What was measured on a task at one point; None is what was not asked for."""

    score: Number | None = None
    stderr: Positive | None = None
    loss: Number | None = None
    loss_stderr: Positive | None = None


class ProbeScore(_Part):
    """What was measured on a probe at one point; after training also the error of the change, paired."""

    score: Number | None = None
    stderr: Positive | None = None
    change_stderr: Positive | None = None


class Measured(_Part):
    """All that was measured at one point, by name."""

    tasks: dict[Name, TaskScore] = {}
    probes: dict[Name, ProbeScore] = {}


class Train(_Part):
    """What training one stage cost. None is what was not recorded."""

    steps: Count | None = None
    seconds: Positive | None = None
    tokens: Count | None = None
    peak_memory_bytes: Count | None = None
    loss: Number | None = None


class Stage(Measured):
    """One task of a sequence: its training, and everything measured after it."""

    task: Name
    train: Train = Train()


class TaskSequence(_Part):
    """One training of one entry through all its tasks."""

    label: Name
    entry: Name
    method: Name
    strategy: Name
    order: Annotated[list[Name], Field(min_length=1)]
    seed: int
    learning_rate: Positive
    settings: dict[str, Any] = {}
    strategy_settings: dict[str, Any] = {}
    folder: Name
    status: Literal["finished", "unfinished", "diverged"]
    trainable_parameters: Count | None = None
    buffer_examples: Count = 0
    buffer_bytes: Count = 0
    stages: list[Stage]

    @property
    def finished(self) -> bool:
        """Whether every task was trained and measured."""
        return self.status == "finished"

    @model_validator(mode="after")
    def _in_order(self) -> TaskSequence:
        trained = [stage.task for stage in self.stages]
        if len(set(self.order)) < len(self.order):
            raise ValueError(f"order names a task twice ({', '.join(self.order)})")
        if trained != self.order[: len(trained)]:
            raise ValueError(f"stages are {trained}, order is {self.order}")
        if self.finished and len(trained) < len(self.order):
            raise ValueError(f"finished with {len(trained)} stages of {len(self.order)}")
        for name, settings in (("settings", self.settings), ("strategy_settings", self.strategy_settings)):
            if _depth(settings) > DEPTH:
                raise ValueError(f"{name} are nested too deeply, at most {DEPTH} objects in each other")
        path = PurePosixPath(self.folder)
        if path.is_absolute() or ".." in path.parts or "\0" in self.folder:
            raise ValueError(f"folder is {self.folder!r}: it must lie in the results folder")
        return self


def _depth(settings: dict[str, Any]) -> int:
    """How many objects and lists lie in each other; by levels, for a hostile file may hold very many."""
    depth = 0
    level: list[Any] = [settings]
    while level:
        depth += 1
        inner = [v for part in level for v in (part.values() if isinstance(part, dict) else part)]
        level = [value for value in inner if isinstance(value, dict | list)]
    return depth


class Results(_Part):
    """The whole document."""

    format: Literal[1]
    name: Name
    description: str = ""
    status: Status
    backbone: str
    tasks: Annotated[list[Task], Field(min_length=1)]
    probes: list[Probe] = []
    before: Measured
    sequences: list[TaskSequence]

    @model_validator(mode="after")
    def _consistent(self) -> Results:
        tasks = [task.name for task in self.tasks]
        for what, names in (
            ("tasks", tasks),
            ("probes", [probe.name for probe in self.probes]),
            ("sequences", [sequence.label for sequence in self.sequences]),
        ):
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{what}: {twice} is there twice")
        for sequence in self.sequences:
            if unknown := sorted(set(sequence.order) - set(tasks)):
                raise ValueError(
                    f"{sequence.label} trains {', '.join(unknown)}, tasks are {', '.join(tasks)}"
                )
        return self


@dataclass(frozen=True)
class ResultsFolder:
    """A results folder and its document."""

    path: Path
    results: Results

    def stage_folders(self, sequence: TaskSequence) -> Iterator[tuple[Stage, Path]]:
        """Each stage of a sequence with its run folder, `stages/NN-task`, whose name starts at 01."""
        for number, stage in enumerate(sequence.stages, start=1):
            stages = self.path / sequence.folder / "stages"
            yield (
                stage,
                next(iter(sorted(stages.glob(f"{number:02d}-*"))), stages / f"{number:02d}-{stage.task}"),
            )


def is_results_folder(path: Path) -> bool:
    """Whether a folder holds the results of a task sequence."""
    return (Path(path) / DOCUMENT).is_file()


def read_results(path: Path) -> ResultsFolder:
    """Read and check the results of a task sequence.

    Raises:
        UserError: `continual.json` is torn, is of another format, or holds something it must not; one line.
    """
    file = Path(path) / DOCUMENT
    document = read_json_object(file, remedy=REMEDY)
    if document.get("format") != 1:
        given = shown(json.dumps(document.get("format")))
        raise UserError(f"{file}: format is {given}, this version reads format 1; {REMEDY}")
    try:
        return ResultsFolder(Path(path), Results.model_validate(document))
    except ValidationError as error:
        details = error.errors()[0]
        place = shown(".".join(str(part) for part in details["loc"]))
        given = "" if details["type"] in ("missing", "value_error") else f" is {_short(details['input'])}"
        message = details["msg"].removeprefix("Value error, ").replace("Input should", "should")
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise UserError(
            f"{file}: {place}{given}{': ' if place else ''}{shown(message, 300)}{more}; {REMEDY}"
        ) from error


def _short(given: Any) -> str:
    return shown(json.dumps(given, ensure_ascii=False, default=str))

"""`continual.json`: what the sequences of a results folder have measured (docs/continual-results.md)."""

from __future__ import annotations

import json
from collections.abc import Sequence as Sequences
from pathlib import Path
from typing import Any

from secura_ds.continual.metrics import paired_stderr, sequence_metrics
from secura_ds.continual.places import StagePlaces, sequence_folder, stage_places, task_files
from secura_ds.files import atomic_write_json
from secura_ds.recipe import Sequence, SequenceRecipe
from secura_ds.tasks import Task

FORMAT = 1
LARGEST = 1e6
"""Losses beyond, and those that are not finite, count as not measured."""
_OF_TASKS = ("score", "stderr", "loss", "loss_stderr")


def write_results(recipe: SequenceRecipe, tasks: Sequences[Task], folder: Path) -> None:
    """Write `continual.json` from what lies in the folder, once the backbone is measured. Main process."""
    if not (folder / "before.json").is_file():
        return  # another process is at it
    before = _read(folder / "before.json")
    named = [
        {
            "name": task.name,
            "metric": task.metric,
            "maximum": task.maximum,
            "chance": task.chance,
            "items": _lines(task_files(folder, task.name).held_out),
        }
        for task in tasks
    ]
    probes = [
        {"name": name, "kind": found["kind"], "chance": found.get("chance"), "items": found["n"]}
        for name, found in before["probes"].items()
    ]
    shown = _shown(before)
    found = [_sequence(sequence, folder, before, named, probes) for sequence in recipe.sequences()]
    document = {
        "format": FORMAT,
        "name": recipe.name,
        "description": recipe.description,
        "status": _status([sequence["status"] == "finished" for sequence in found]),
        "backbone": recipe.backbone.model,
        "tasks": named,
        "probes": probes,
        "before": shown,
        "sequences": found,
    }
    atomic_write_json(folder / "continual.json", document)


def _sequence(
    sequence: Sequence,
    folder: Path,
    before: dict[str, Any],
    tasks: Sequences[dict[str, Any]],
    probes: Sequences[dict[str, Any]],
) -> dict[str, Any]:
    places = [stage_places(folder, sequence, number) for number in range(len(sequence.order))]
    stages = [
        _stage(task, place, before)
        for task, place in zip(sequence.order, places, strict=True)
        if place.finished()
    ]
    finished = len(stages) == len(places)
    buffers = [place.buffer for place in places if place.buffer.is_file()]
    run = _read(places[0].run / "run.json") if stages else {}
    return {
        "label": sequence.label,
        "entry": _entry_name(sequence),
        "method": sequence.entry.adapter.method,
        "strategy": sequence.entry.strategy.kind,
        "order": sequence.order,
        "seed": sequence.seed,
        "learning_rate": sequence.learning_rate,
        "settings": sequence.entry.adapter.model_dump(mode="json"),
        "strategy_settings": sequence.entry.strategy.model_dump(mode="json"),
        "folder": str(sequence_folder(folder, sequence).relative_to(folder)),
        "status": "diverged" if diverged_mark(folder, sequence).is_file() else _status([finished]),
        "trainable_parameters": run.get("trainable_parameters"),
        "buffer_examples": max(map(_lines, buffers), default=0),
        "buffer_bytes": max((path.stat().st_size for path in buffers), default=0),
        "stages": stages,
        "metrics": sequence_metrics(_shown(before), stages, tasks, probes, sequence.order)
        if finished
        else None,
    }


def _entry_name(sequence: Sequence) -> str:
    """The entry's name, with the rate where it has several: results tell these apart."""
    name, rates = sequence.entry.name, sequence.entry.learning_rates
    return name if len(rates) == 1 else f"{name}, {sequence.learning_rate:g}"


def diverged_mark(folder: Path, sequence: Sequence) -> Path:
    """The file that says why a sequence ended before its last task."""
    return sequence_folder(folder, sequence) / "diverged.json"


def mark_diverged(folder: Path, sequence: Sequence, reason: str) -> None:
    """Write down why a sequence ended, once. Main process."""
    if not diverged_mark(folder, sequence).is_file():
        atomic_write_json(diverged_mark(folder, sequence), {"reason": reason})


def _stage(task: str, place: StagePlaces, before: dict[str, Any]) -> dict[str, Any]:
    scores, run = _read(place.scores), _read(place.run / "run.json")
    return {
        "task": task,
        **_shown(scores, before),
        "train": {
            "steps": run["steps"],
            "seconds": run["seconds"],
            "tokens": run["tokens"],
            "peak_memory_bytes": run["peak_memory_bytes"],
            "loss": _last_loss(place.run / "metrics.jsonl"),
            "validation_loss": scores.get("validation_loss"),
        },
    }


def _shown(scores: dict[str, Any], before: dict[str, Any] | None = None) -> dict[str, Any]:
    """The numbers of a measurement, without single items and answers.

    With those of the untouched backbone, also the error of each probe's change from it, by paired items.
    """
    probes = {}
    for name, found in scores["probes"].items():
        value = found["score"] if "score" in found else found["mean_token_loss"]
        probes[name] = {"score": _known(value), "stderr": _known(found["stderr"])}
        if before is not None:
            items = before["probes"][name]["items"]
            probes[name]["change_stderr"] = _known(paired_stderr(items, found["items"]))
    tasks = {
        name: {key: _known(found.get(key)) for key in _OF_TASKS} for name, found in scores["tasks"].items()
    }
    return {"tasks": tasks, "probes": probes}


def _known(value: float | None) -> float | None:
    """The number; None for one that is not finite or beyond `LARGEST`."""
    return value if value is not None and abs(value) <= LARGEST else None


def _last_loss(path: Path) -> float | None:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    return losses[-1] if losses else None


def _status(finished: list[bool]) -> str:
    return "finished" if all(finished) else "unfinished"


def _lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))

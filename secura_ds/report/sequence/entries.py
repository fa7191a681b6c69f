"""Entries of results folders: sequences of one setting over the same tasks, joined over seeds and orders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from secura_ds.continual.metrics import Estimate, ScoreMatrix, Summary, over_sequences, score_matrix
from secura_ds.continual.metrics import sequence_metrics as metrics_of
from secura_ds.report.sequence.folder import Measured, Probe, ResultsFolder, Task, TaskSequence
from secura_ds.report.verdict import METHOD_NAMES

STRATEGY_NAMES = {"seq": "", "er": "replay", "ewc": "EWC", "i-lora": "I-LoRA", "protect": "protection"}
MOST_SETTINGS = 2
"""That a line's name has room for."""


@dataclass(frozen=True)
class Entry:
    """One setting with its sequences over one set of tasks.

    `index` gives its colour, dash and marker everywhere.
    """

    label: str
    index: int
    home: ResultsFolder
    sequences: tuple[TaskSequence, ...]

    @property
    def first(self) -> TaskSequence:
        """A sequence of the entry, for what all of them share: method, strategy, rate, settings."""
        return self.sequences[0]

    @property
    def tasks(self) -> list[Task]:
        """The document's tasks."""
        return self.home.results.tasks

    @property
    def probes(self) -> list[Probe]:
        """The document's probes."""
        return self.home.results.probes

    @property
    def finished(self) -> list[TaskSequence]:
        """The sequences that went through all their tasks."""
        return [sequence for sequence in self.sequences if sequence.finished]

    def begun(self, order: tuple[str, ...] | None = None) -> bool:
        """Whether anything was measured after a task, in one order or in any."""
        return any(s.stages for s in self.sequences if order is None or tuple(s.order) == order)

    @property
    def single(self) -> bool:
        """Whether the entry trains one task only."""
        return all(len(sequence.order) == 1 for sequence in self.sequences)

    @property
    def orders(self) -> list[tuple[str, ...]]:
        """The different orders of tasks, as they come."""
        return list(dict.fromkeys(tuple(sequence.order) for sequence in self.sequences))

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of each finished sequence, computed anew from its scores."""
        return self._metrics(given_before=False)

    @cached_property
    def metrics_given_before(self) -> list[dict[str, Any]]:
        """The same with the backbone's scores taken as exact, as is right when entries of it are compared."""
        return self._metrics(given_before=True)

    def _metrics(self, *, given_before: bool) -> list[dict[str, Any]]:
        before = self.home.results.before.model_dump()
        if given_before:
            before = _exact(before)
        tasks, probes = ([part.model_dump() for part in parts] for parts in (self.tasks, self.probes))
        result = []
        for sequence in self.finished:
            stages = [stage.model_dump() for stage in sequence.stages]
            if given_before:
                stages = [_of_change(stage) for stage in stages]
            references = self._references(sequence)
            result.append(metrics_of(before, stages, tasks, probes, sequence.order, references=references))
        return result

    def summary(self, *keys: str, given_before: bool = False) -> Summary | None:
        """A metric over the finished sequences, by its path of keys; None unless each of them has it."""
        found = [
            _inner(metrics, keys) for metrics in (self.metrics_given_before if given_before else self.metrics)
        ]
        known = [Estimate(value["value"], value["stderr"]) for value in found if value is not None]
        return over_sequences(known) if len(known) == len(found) else None

    def matrix(self, order: tuple[str, ...], key: str = "score") -> ScoreMatrix:
        """The score matrix of one order, each cell the mean over its seeds that reached it."""
        before = self.home.results.before.model_dump()
        tasks = [task.model_dump() for task in self.tasks]
        found = [
            score_matrix(before, [stage.model_dump() for stage in s.stages], tasks, order, key=key)
            for s in self.sequences
            if tuple(s.order) == order
        ]
        scores, errors = np.full_like(found[0].scores, np.nan), np.full_like(found[0].scores, np.nan)
        for cell in np.ndindex(*scores.shape):
            cells = [_cell(matrix, cell) for matrix in found if np.isfinite(matrix.scores[cell])]
            if joined := over_sequences(cells):
                scores[cell] = joined.value
                errors[cell] = np.nan if joined.stderr is None else joined.stderr
        return ScoreMatrix(order, scores, errors)

    def probe_series(self, name: str, order: tuple[str, ...] | None = None) -> list[Summary | None]:
        """A probe's score before training and after each stage, over the sequences that reached it.

        With `order`, over the sequences of that order alone.
        """
        chosen = [s for s in self.sequences if order is None or tuple(s.order) == order]
        points: list[list[Measured]] = [[self.home.results.before]]
        for place in range(max(len(s.order) for s in chosen)):
            points.append([s.stages[place] for s in chosen if len(s.stages) > place])
        result = []
        for point in points:
            scores = [measured.probes[name] for measured in point if name in measured.probes]
            known = [Estimate(s.score, s.stderr) for s in scores if s.score is not None]
            result.append(over_sequences(known))
        return result

    def _references(self, sequence: TaskSequence) -> dict[str, Estimate]:
        """Scores of tasks trained alone with the same setting, where this folder has them."""
        found: dict[str, list[Estimate]] = {}
        if len(sequence.order) == 1:
            return {}
        maxima = {task.name: task.maximum for task in self.tasks}
        for other in self.home.results.sequences:
            if not other.finished or len(other.order) != 1 or _setting(other) != _setting(sequence):
                continue
            scored = other.stages[0].tasks.get(other.order[0])
            if scored is not None and scored.score is not None:
                scale = maxima[other.order[0]]
                error = None if scored.stderr is None else scored.stderr / scale
                found.setdefault(other.order[0], []).append(Estimate(scored.score / scale, error))
        joined = {name: over_sequences(estimates) for name, estimates in found.items()}
        return {name: Estimate(s.value, s.stderr) for name, s in joined.items() if s is not None}


@dataclass(frozen=True)
class Part:
    """Entries over the same tasks: those that compare. What other tasks taught would only spread them."""

    title: str
    entries: list[Entry]


@dataclass(frozen=True)
class Line:
    """Entries that differ in the learning rate alone, by rising rate."""

    label: str
    index: int
    entries: tuple[Entry, ...]


def entries(homes: Sequence[ResultsFolder]) -> list[Entry]:
    """All entries of one folder, or of several; where names meet, the folder's name goes first.

    An entry that was trained on several sets of tasks is there once for each, with the same label and index.
    """
    named = [{sequence.entry for sequence in home.results.sequences} for home in homes]
    groups: dict[tuple[str, frozenset[str]], Entry] = {}
    for home in homes:
        for sequence in home.results.sequences:
            shared = sum(sequence.entry in names for names in named) > 1
            label = f"{_home_label(home, homes)}: {sequence.entry}" if shared else sequence.entry
            key = (label, frozenset(sequence.order))
            entry = groups.get(key, Entry(label, 0, home, ()))
            groups[key] = replace(entry, sequences=(*entry.sequences, sequence))
    labels = list(dict.fromkeys(label for label, _ in groups))
    return [replace(entry, index=labels.index(label)) for (label, _), entry in groups.items()]


def parts(found: Sequence[Entry]) -> list[Part]:
    """Entries by the tasks they were trained on, the most tasks first."""
    groups: dict[frozenset[str], list[Entry]] = {}
    for entry in found:
        groups.setdefault(frozenset(entry.first.order), []).append(entry)
    ordered = sorted(groups.items(), key=lambda item: -len(item[0]))
    return [Part(_title(group[0]), group) for _, group in ordered]


def _title(entry: Entry) -> str:
    order = entry.first.order
    return ", ".join(order) if len(order) <= 3 else f"{len(order)} tasks"


def lines(found: Sequence[Entry]) -> list[Line]:
    """Entries grouped by all but their learning rate, each named by its method and what sets it apart.

    Where that is more than a name has room for, it is the recipe's own name.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in found:
        groups.setdefault(_without_rate(entry.first), []).append(entry)
    labels = _line_labels([group[0] for group in groups.values()])
    return [
        Line(label, index, tuple(sorted(group, key=lambda entry: entry.first.learning_rate)))
        for index, (label, group) in enumerate(zip(labels, groups.values(), strict=True))
    ]


def method_name(sequence: TaskSequence) -> str:
    """`LoRA`, or `LoRA + replay`."""
    strategy = STRATEGY_NAMES.get(sequence.strategy, sequence.strategy)
    return METHOD_NAMES.get(sequence.method, sequence.method) + (f" + {strategy}" if strategy else "")


def _line_labels(firsts: Sequence[Entry]) -> list[str]:
    names = [method_name(entry.first) for entry in firsts]
    labels = []
    for entry, name in zip(firsts, names, strict=True):
        alike = [_settings(other.first) for other, n in zip(firsts, names, strict=True) if n == name]
        mine = _settings(entry.first)
        apart = [
            f"{key.rpartition('.')[2].replace('_', ' ')} {value}"
            for key, value in mine.items()
            if any(other.get(key) != value for other in alike)
        ]
        own = entry.label.removesuffix(f", {entry.first.learning_rate:g}")
        labels.append(", ".join([name, *apart]) if len(apart) <= MOST_SETTINGS else own)
    return labels


def _settings(sequence: TaskSequence) -> dict[str, str]:
    return _flat({"adapter": sequence.settings, "strategy": sequence.strategy_settings})


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, dict):
        return {prefix: value if isinstance(value, str) else json.dumps(value)}
    result: dict[str, str] = {}
    for key, inner in value.items():
        result |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return result


def _without_rate(sequence: TaskSequence) -> str:
    settings = [sequence.method, sequence.strategy, sequence.settings, sequence.strategy_settings]
    return json.dumps(settings, sort_keys=True)


def _setting(sequence: TaskSequence) -> tuple[str, float]:
    return _without_rate(sequence), sequence.learning_rate


def _home_label(home: ResultsFolder, homes: Sequence[ResultsFolder]) -> str:
    names = [other.results.name for other in homes]
    return home.results.name if names.count(home.results.name) == 1 else str(home.path)


def _exact(before: dict[str, Any]) -> dict[str, Any]:
    """Scores without their errors' share: each known standard error is 0."""
    return {
        what: {
            name: {
                key: 0.0 if key.endswith("stderr") and value is not None else value
                for key, value in fields.items()
            }
            for name, fields in scores.items()
        }
        for what, scores in before.items()
    }


def _of_change(stage: dict[str, Any]) -> dict[str, Any]:
    """A stage whose probes have the error of their paired change, where it is known: all that is left of it
    once the backbone's score is exact."""
    probes = {
        name: probe if probe["change_stderr"] is None else probe | {"stderr": probe["change_stderr"]}
        for name, probe in stage["probes"].items()
    }
    return stage | {"probes": probes}


def _inner(metrics: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        metrics = metrics.get(key) if metrics is not None else None
    return metrics


def _cell(matrix: ScoreMatrix, cell: tuple[int, ...]) -> Estimate:
    error = float(matrix.errors[cell])
    return Estimate(float(matrix.scores[cell]), error if np.isfinite(error) else None)

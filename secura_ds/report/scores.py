"""The scores inside an evaluation document, in one shape for the terminal's table and for the page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secura_ds.report import numbers

METRIC_NAMES = {
    "exact_match": "exact match",
    "json_exact_match": "JSON exact match",
    "bleu": "BLEU",
    "rougeL": "ROUGE-L",
}
POINT_METRICS = ("bleu",)
"""Metrics on a scale of 0 to 100; every other score is a share of 1."""


@dataclass(frozen=True)
class Score:
    """One number of an evaluation. Shares are of 1, points of 100, losses in nats per token."""

    name: str
    label: str
    kind: str
    """`task`, `probe` (a share of right answers) or `text` (a mean token loss)."""
    unit: str
    """`share`, `points` or `nats`."""
    value: float
    stderr: float | None = None
    n: int | None = None
    chance: float | None = None
    items: tuple[float, ...] | None = None
    """Each item's own score, where the document lists them."""

    def text(self) -> str:
        """The value with its standard error and unit: `91.4 % ± 2.0`."""
        error = ""
        if self.stderr is not None:
            scale, digits = (100, 1) if self.unit == "share" else (1, 1 if self.unit == "points" else 3)
            error = f" ± {numbers.decimal(scale * self.stderr, digits)}"
        return f"{self.value_text()}{error}"

    def value_text(self) -> str:
        """The value with its unit, without its error."""
        return _written(self.value, self.unit, signed=False)

    def change(self, before: Score) -> float:
        """How far this score is above `before`."""
        return self.value - before.value

    def change_text(self, before: Score) -> str:
        """The signed difference from `before`, in percentage points for shares."""
        return _written(self.change(before), self.unit, signed=True)

    def change_stderr(self, before: Score) -> float | None:
        """Standard error of the difference from `before`: paired where possible, else as if independent."""
        paired = self.paired_stderr(before)
        if paired is not None or self.stderr is None or before.stderr is None:
            return paired
        return math.hypot(self.stderr, before.stderr)

    def paired_stderr(self, before: Score) -> float | None:
        """Standard error of the mean difference over the same items; None unless both documents list them."""
        if self.items is None or before.items is None or not len(self.items) == len(before.items) > 1:
            return None
        differences = [new - old for new, old in zip(self.items, before.items, strict=True)]
        return statistics.stdev(differences) / math.sqrt(len(differences))


def _written(value: float, unit: str, *, signed: bool) -> str:
    if unit == "share":
        return f"{numbers.decimal(100 * value, 1, signed=signed)} {'points' if signed else '%'}"
    return numbers.decimal(value, 1 if unit == "points" else 3, signed=signed)


def task_score(evaluation: Mapping[str, Any] | None) -> Score | None:
    """The task's score, or None where nothing was evaluated."""
    task = _mapping(_mapping(evaluation).get("task"))
    metric = str(task.get("metric", "score"))
    value = _float(task.get("score"))
    if value is None:
        return None
    label = f"Task: {METRIC_NAMES.get(metric, metric)}"
    unit = "points" if metric in POINT_METRICS else "share"
    return _score("task", label, "task", unit, value, task)


def probe_scores(evaluation: Mapping[str, Any] | None) -> dict[str, Score]:
    """The retention probes by name: right-answer probes and mean token losses."""
    result = {}
    for name, probe in _mapping(_mapping(evaluation).get("probes")).items():
        score = _probe_score(f"probes.{name}", str(name), _mapping(probe))
        if score is not None:
            result[str(name)] = score
    return result


def all_scores(evaluation: Mapping[str, Any] | None) -> dict[str, Score]:
    """Task first, then probes of knowledge, then text losses."""
    task = task_score(evaluation)
    probes = sorted(probe_scores(evaluation).values(), key=lambda score: score.kind != "probe")
    return {score.name: score for score in ([task] if task else []) + probes}


def part_scores(evaluation: Mapping[str, Any] | None, probe: str) -> dict[str, Score]:
    """A probe's scores by topic; empty where the evaluation has none."""
    topics = _mapping(_mapping(_mapping(evaluation).get("probes")).get(probe)).get("topics")
    result = {}
    for topic, fields in _mapping(topics).items():
        score = _probe_score(f"{probe}/{topic}", str(topic), _mapping(fields))
        if score is not None:
            result[str(topic)] = score
    return result


def _probe_score(name: str, label: str, probe: Mapping[str, Any]) -> Score | None:
    loss = _float(probe.get("mean_token_loss"))
    if loss is not None:
        return _score(name, label, "text", "nats", loss, probe)
    value = _float(probe.get("score"))
    return None if value is None else _score(name, label, "probe", "share", value, probe)


def _score(name: str, label: str, kind: str, unit: str, value: float, fields: Mapping[str, Any]) -> Score:
    n = _float(fields.get("n"))
    return Score(
        name=name,
        label=label,
        kind=kind,
        unit=unit,
        value=value,
        stderr=_float(fields.get("stderr")),
        n=None if n is None else int(n),
        chance=_float(fields.get("chance")),
        items=_items(fields.get("items")),
    )


def _items(values: Any) -> tuple[float, ...] | None:
    if not isinstance(values, list):
        return None
    known = tuple(number for value in values if (number := _float(value)) is not None)
    return known if len(known) == len(values) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)

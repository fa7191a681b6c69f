"""What a run left behind, read back. Missing files are part of life; torn lines are skipped and counted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from secura_ds.errors import UserError

RUN_MARKS = ("run.json", "recipe.resolved.json", "metrics.jsonl")
"""A folder with none of these is no run folder."""

Series = tuple[list[float], list[float]]
"""Steps, and the value at each."""


@dataclass(frozen=True)
class RunFolder:
    """Everything the report knows of one run. A file that does not exist is None (or an empty list)."""

    path: Path
    label: str
    run: dict[str, Any] | None
    recipe: dict[str, Any] | None
    environment: dict[str, Any] | None
    data: dict[str, Any] | None
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    merge: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    statistics: list[dict[str, Any]]
    skipped_lines: dict[str, int] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The adapter's method (`secura`, `lora` ...), or `unknown`."""
        return str(self.setting("adapter", "method", default="unknown"))

    def setting(self, *keys: str, default: Any = None) -> Any:
        """A value of the resolved recipe by its path of keys; `default` where it is absent."""
        value: Any = self.recipe
        for key in keys:
            if not isinstance(value, Mapping) or key not in value:
                return default
            value = value[key]
        return value

    def series(self, key: str, *, scale: float = 1.0) -> Series:
        """Steps and finite values of one quantity of `metrics.jsonl`, times `scale`."""
        points = [(_number(row.get("step")), _number(row.get(key))) for row in self.metrics]
        kept = [(step, value * scale) for step, value in points if step is not None and value is not None]
        return [step for step, _ in kept], [value for _, value in kept]

    def layer_series(self, key: str) -> dict[str, Series]:
        """Per layer, steps and finite values of one quantity of `statistics.jsonl`."""
        result: dict[str, Series] = {}
        for row in self.statistics:
            step = _number(row.get("step"))
            layers = row.get("layers")
            if step is None or not isinstance(layers, Mapping):
                continue
            for name, values in layers.items():
                value = _number(values.get(key)) if isinstance(values, Mapping) else None
                if value is not None:
                    steps, numbers = result.setdefault(str(name), ([], []))
                    steps.append(step)
                    numbers.append(value)
        return result


def read_run(path: Path) -> RunFolder:
    """Read a run folder; only a folder that is none, or a broken JSON document, is an error.

    Raises:
        UserError: `path` is no run folder, or one of its JSON documents cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give the output_dir of a run or of task sequences")
    if not any((path / name).is_file() for name in RUN_MARKS):
        raise UserError(
            f"{path} is no run folder (it has none of {', '.join(RUN_MARKS)}), nor one of task sequences "
            "(continual.json): give the output_dir of either"
        )
    skipped: dict[str, int] = {}
    recipe = _read_document(path / "recipe.resolved.json")
    return RunFolder(
        path=path,
        label=str((recipe or {}).get("name") or path.resolve().name),
        run=_read_document(path / "run.json"),
        recipe=recipe,
        environment=_read_document(path / "environment.json"),
        data=_read_document(path / "data.json"),
        before=_read_document(path / "evaluation.before.json"),
        after=_read_document(path / "evaluation.after.json"),
        merge=_read_document(path / "merge.json"),
        metrics=read_log(path / "metrics.jsonl", skipped),
        statistics=read_log(path / "statistics.jsonl", skipped),
        skipped_lines=skipped,
    )


def read_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """Read several run folders and give each a label of its own: recipe name, else folder name, else path.

    Raises:
        UserError: no path, the same folder twice, or one that is no run folder.
    """
    if not paths:
        raise UserError("no run folder given: name at least one output_dir of a training run")
    real = [Path(path).resolve() for path in paths]
    for path, resolved in zip(paths, real, strict=True):
        if real.count(resolved) > 1:
            raise UserError(f"{path} is given twice: name each run folder once")
    runs = [read_run(path) for path in paths]
    choices = ([r.label for r in runs], [p.name for p in real], [str(p) for p in paths])
    labels = next((c for c in choices if len(set(c)) == len(c)), choices[-1])
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _read_document(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); delete it or let its command write it again") from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: expected a JSON object, found {type(value).__name__}; let its command write it again"
        )
    return value


def read_log(path: Path, skipped: dict[str, int]) -> list[dict[str, Any]]:
    """Rows of an append-only log, the last of each step and kind winning (a resumed run repeats some)."""
    if not path.is_file():
        return []
    rows: dict[tuple[float, bool], dict[str, Any]] = {}
    for line in path.read_bytes().splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        step = _number(row.get("step")) if isinstance(row, dict) else None
        if step is None:
            skipped[path.name] = skipped.get(path.name, 0) + 1
        else:
            rows[(step, "eval_loss" in row)] = row
    return [rows[key] for key in sorted(rows)]

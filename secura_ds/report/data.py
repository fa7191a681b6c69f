"""What became of the training data, source by source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from secura_ds.report import numbers
from secura_ds.report.run_folder import RunFolder

_COUNTS = {"read": "Read", "used": "Used", "cut": "Cut to max_length", "dropped": "Dropped"}


class DataTable(NamedTuple):
    """One account of data, of the runs that have the same."""

    runs: list[str]
    """Their labels."""
    summary: str
    headers: list[str]
    rows: list[list[str]]


def data_tables(runs: Sequence[RunFolder]) -> list[DataTable]:
    """A table of sources for each account that differs; runs without `data.json` have none."""
    tables: list[tuple[dict[str, Any], DataTable]] = []
    for run in runs:
        if run.data is None:
            continue
        same = next((table for data, table in tables if data == run.data), None)
        if same is None:
            tables.append((run.data, _table(run.label, run.data)))
        else:
            same.runs.append(run.label)
    return [table for _, table in tables]


def _table(label: str, data: Mapping[str, Any]) -> DataTable:
    sources = [source for source in data.get("sources") or [] if isinstance(source, Mapping)]
    # Columns that say nothing of any source are left out.
    shown = [key for key in _COUNTS if key in ("read", "used") or any(source.get(key) for source in sources)]
    unused = any(source.get("unused") for source in sources)
    headers = ["Source", *(_COUNTS[key] for key in shown), *(["Fields not used"] if unused else [])]
    rows = []
    for source in sources:
        cells = [_count(source.get(key)) for key in shown]
        fields = [", ".join(source.get("unused") or []) or numbers.MISSING] if unused else []
        rows.append([str(source.get("name", "unknown")), *cells, *fields])
    return DataTable([label], _summary(data), headers, rows)


def _summary(data: Mapping[str, Any]) -> str:
    parts = (
        ("train_examples", "training examples"),
        ("train_rows", "rows"),
        ("train_tokens", "tokens"),
        ("learnt_tokens", "of these learnt"),
        ("validation_examples", "examples for validation"),
    )
    return ", ".join(f"{_count(data[key])} {what}" for key, what in parts if data.get(key))


def _count(value: Any) -> str:
    return numbers.count(value) if isinstance(value, int | float) else numbers.MISSING

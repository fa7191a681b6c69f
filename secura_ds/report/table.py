"""Plain-text tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secura_ds.report import numbers
from secura_ds.report.scores import all_scores


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay rows out in columns; a column whose every cell starts like a number is aligned right.

    Args:
        headers: One name per column.
        rows: As many cells per row as there are headers; None is shown as a dash.

    Returns:
        Lines without trailing blanks and without a final newline.

    Raises:
        ValueError: a row has another number of cells than there are headers.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    if any(len(row) != len(headers) for row in cells):
        raise ValueError(f"every row needs {len(headers)} cells, one for each of {list(headers)}")
    columns = list(zip(headers, *cells, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    right = [len(column) > 1 and all(_is_number(cell) for cell in column[1:]) for column in columns]
    lines = [list(headers), ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if align else cell.ljust(width)
            for cell, width, align in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def evaluation_table(evaluations: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Evaluation documents side by side, one column each (`before`, `after`), one row per score.

    Exactly two columns get a third, the change from the first to the second.
    """
    scores = {title: all_scores(document) for title, document in evaluations.items()}
    names = list(dict.fromkeys(name for column in scores.values() for name in column))
    first_two = list(scores.values())[:2] if len(scores) == 2 else None
    rows: list[list[object]] = []
    for name in names:
        shown = [column.get(name) for column in scores.values()]
        some = next(score for score in shown if score is not None)
        label = f"{some.label} (nats/token)" if some.unit == "nats" else some.label
        row: list[object] = [label, *(score.text() if score else None for score in shown)]
        if first_two:
            old, new = (column.get(name) for column in first_two)
            row.append(new.change_text(old) if old and new else None)
        row += [some.n, None if some.chance is None else numbers.share(some.chance)]
        rows.append(row)
    change = ["change"] if first_two else []
    return format_table(["score", *scores, *change, "items", "chance"], rows)


def _cell(value: object) -> str:
    if value is None:
        return numbers.MISSING
    return " ".join(str(value).split())


def _is_number(cell: str) -> bool:
    return cell == numbers.MISSING or cell[:1].isdigit() or (cell[:1] in "+-\u2212." and cell[1:2].isdigit())

"""What all generated tasks share: rows drawn with a seed until there are enough different ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]
"""`{"prompt", "completion"}`, or of a multiple choice `{"prompt", "choices", "answer"}`."""
Split = tuple[list[Row], list[Row]]
"""Rows to train on, held-out rows."""

TRAIN_ROWS = 600
TEST_ROWS = 100
SEED = 20251
ATTEMPTS = 10_000


def listed(words: str) -> list[str]:
    """Words with blanks between them as a list."""
    return words.split()


def draw_for(name: str) -> random.Random:
    """The random generator of a task."""
    return random.Random(f"{SEED} {name}")


def split_rows(name: str, make_row: Callable[[random.Random], Row]) -> Split:
    """Rows with different prompts, drawn one by one; the last ones are held out."""
    draw = draw_for(name)
    made: dict[str, Row] = {}
    for _ in range(ATTEMPTS):
        row = make_row(draw)
        made.setdefault(row["prompt"], row)
        if len(made) == TRAIN_ROWS + TEST_ROWS:
            break
    assert len(made) == TRAIN_ROWS + TEST_ROWS, f"{name} has too few different prompts: {len(made)}"
    rows = list(made.values())
    return rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]


def written(prompt: str, completion: str) -> Row:
    """A row whose answer is written."""
    return {"prompt": prompt, "completion": completion}


def choice(prompt: str, right: str, wrong: Iterable[str], draw: random.Random) -> Row:
    """A row whose answer is chosen, its choices shuffled."""
    choices = [right, *wrong]
    draw.shuffle(choices)
    return {"prompt": prompt, "choices": choices, "answer": choices.index(right)}


def to_jsonl(rows: Sequence[Row]) -> str:
    """The text of a file: one row a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

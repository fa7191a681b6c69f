"""The shipped task and probes: current with their generators, and what their README says of them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import make_probes  # noqa: E402
import make_tasks  # noqa: E402
import order_patterns  # noqa: E402
import order_words  # noqa: E402

from secura_ds.reading import read_rows  # noqa: E402

TASKS, PROBES = ROOT / "recipes" / "tasks", ROOT / "recipes" / "probes"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path)]


def test_files_are_current_with_their_generators() -> None:
    train, test = make_tasks.make_task()
    assert rows_of(TASKS / "orders-train.jsonl") == train
    assert rows_of(TASKS / "orders-test.jsonl") == test
    assert (PROBES / "knowledge.jsonl").read_text("utf-8") == make_probes.mixed(make_probes.make_items())


def test_held_out_orders_are_new_and_half_of_their_words_too() -> None:
    train, test = (rows_of(TASKS / f"orders-{name}.jsonl") for name in ("train", "test"))
    assert (len(train), len(test)) == (2000, 200)
    assert len({row["prompt"] for row in train + test}) == 2200
    assert not set(order_patterns.PATTERNS) & set(order_patterns.UNSEEN_PATTERNS)
    assert not set(order_words.NAMES) & set(order_words.UNSEEN_NAMES)
    seen_items = {json.loads(row["completion"])["item"].lower() for row in train}
    unseen = [json.loads(row["completion"])["item"].lower() not in seen_items for row in test]
    assert sum(unseen) == 100


def test_answers_are_strict_json_with_words_of_the_message() -> None:
    for row in rows_of(TASKS / "orders-train.jsonl") + rows_of(TASKS / "orders-test.jsonl"):
        answer = json.loads(row["completion"])
        assert list(answer) == ["customer", "item", "quantity", "day"]
        assert answer["customer"] in row["prompt"] and answer["item"] in row["prompt"]
        assert isinstance(answer["quantity"], int)


def test_questions_are_sound_and_guessing_scores_a_quarter() -> None:
    rows = rows_of(PROBES / "knowledge.jsonl")
    assert len(rows) == len({row["question"] for row in rows}) == 288
    assert all(len(set(row["choices"])) == 4 for row in rows)
    places = Counter(row["answer"] for row in rows)
    assert all(50 < places[i] < 95 for i in range(4))

"""The shipped wide probes: current with their generators, sound, and what the README says of them."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import make_probes  # noqa: E402

from secura_ds.reading import read_rows, read_text  # noqa: E402

PROBES = ROOT / "recipes" / "probes"
README = read_text(ROOT / "recipes" / "tasks" / "README.md")


def questions() -> list[dict[str, Any]]:
    return [row for _, row in read_rows(PROBES / "knowledge-wide.jsonl")]


def test_questions_are_current_with_their_generator() -> None:
    assert read_text(PROBES / "knowledge-wide.jsonl") == make_probes.mixed(make_probes.make_wide_items())


def test_wide_questions_hold_the_narrow_ones_and_are_sound() -> None:
    rows = questions()
    assert len(rows) == len({row["question"] for row in rows}) == 1213
    assert all(len(set(row["choices"])) == 4 for row in rows)
    narrow = {json.dumps(row) for _, row in read_rows(PROBES / "knowledge.jsonl")}
    assert narrow < {json.dumps(row) for row in rows}
    places = Counter(row["answer"] for row in rows)
    assert all(270 < places[i] < 340 for i in range(4))
    topics = Counter(row["topic"] for row in rows)
    assert len(topics) == 46 and min(topics.values()) >= 12


def test_what_is_right_as_well_is_never_a_wrong_choice() -> None:
    facts = {"young": ("What is {} called when young?", "a duck: a duckling / a chick, a hen: a chick, "
                       "a cat: a kitten, a dog: a puppy, a cow: a calf")}  # fmt: skip
    for seed in range(50):
        first, *_ = make_probes.topic_items("young", facts, random.Random(seed))
        assert set(first["choices"]) == {"a duckling", "a kitten", "a puppy", "a calf"}
        assert first["choices"][first["answer"]] == "a duckling"


def test_topics_left_out_are_as_the_figures_say() -> None:
    figures = json.loads(read_text(ROOT / "benchmarks" / "results" / "probe_scores.json"))["probes"]
    assert set(figures["left-out"]["topics"]) == set(make_probes.LEFT_OUT)
    assert all(topic["score"] < 0.5 for topic in figures["left-out"]["topics"].values())
    wide = set(make_probes.WORDS) | set(make_probes.WORLD)
    used = wide - set(make_probes.LEFT_OUT)
    assert all(figures["knowledge-wide"]["topics"][topic]["score"] >= 0.5 for topic in used)
    assert figures["knowledge-wide"]["n"] == len(questions())


def test_the_readme_has_the_figures() -> None:
    figures = json.loads(read_text(ROOT / "benchmarks" / "results" / "probe_scores.json"))["probes"]
    questions, text = figures["knowledge-wide"], figures["general-wide"]
    row = f"knowledge, wide, all {questions['n']:,} | {questions['score']:.1%} ± {questions['stderr']:.1%}"
    assert row.replace("%", " %", 1).removesuffix("%") in README
    loss = f"{text['mean_token_loss']:.3f} ± {text['stderr']:.3f} nats a token"
    assert f"general text, wide, all {text['n']} windows of 256 tokens | {loss}" in README
    prose = " ".join(README.split())
    for name, topic in {"dishes": "dish", "myths": "myth", "counts": "count"}.items():
        assert f"{name} {figures['left-out']['topics'][topic]['score']:.0%}".replace("%", " %") in prose

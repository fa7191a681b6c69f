"""Who learnt most and who forgot least, in a few careful sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from secura_ds.report import numbers
from secura_ds.report.sequence.entries import Entry, Line, lines
from secura_ds.report.sequence.matched import matched
from secura_ds.report.sequence.measures import (
    FORGETTING_DIAGONAL,
    KNOWLEDGE,
    LOSS_FORGOTTEN,
    LOSS_LEARNT,
    PLASTICITY,
    RETENTION,
    TASK_LOSS,
    TEXT_LOSS,
    Comparison,
    Measure,
    compare,
    ranked,
)
from secura_ds.report.verdict import Finding

ENOUGH = 3
"""Fewer sequences than this say little about how seeds and orders spread."""


def findings(entries: Sequence[Entry]) -> list[Finding]:
    """The verdict; only what was measured on finished sequences, and never more than its errors allow."""
    done = [entry for entry in entries if entry.finished]
    if not done:
        return [Finding("even", "No sequence is finished yet: nothing can be said.")]
    result = []
    for merit, choices in (
        ("learnt most", (PLASTICITY, LOSS_LEARNT)),
        ("forgot least of its own tasks", (FORGETTING_DIAGONAL, LOSS_FORGOTTEN)),
        ("kept most of what the backbone knew", (RETENTION, KNOWLEDGE)),
        ("lost least on general text", (TEXT_LOSS,)),
    ):
        measure = _first(done, choices)
        if measure is not None:
            result.append(_finding(merit, measure, done))
    if all(entry.single for entry in done):
        result += _at_equal_loss(done)
    if trade := _trade(done):
        result.append(trade)
    return [*result, *_caveats(done)]


def _first(done: Sequence[Entry], choices: Sequence[Measure]) -> Measure | None:
    return next((measure for measure in choices if any(measure.of(entry) for entry in done)), None)


def _finding(merit: str, measure: Measure, done: list[Entry]) -> Finding:
    """The best entry, and how far the best of another setting is behind it."""
    order = ranked(done, measure)
    best, found = order[0]
    text = f"{measure.title} {measure.written(found)}{_unit(measure)}"
    if len(order) == 1:
        return Finding("even", f"{best.label}: {text}.")
    text = f"{best.label} {merit}: {text}"
    homes = {entry.index: line.index for line in lines(done) for entry in line.entries}
    others = [pair for pair in order[1:] if homes[pair[0].index] != homes[best.index]]
    other, second = (others or order[1:])[0]
    if best.home.results.backbone != other.home.results.backbone:
        return Finding("even", f"{text}; {other.label} has another backbone, so they do not compare.")
    lead = compare(best, other, measure)
    which = "the best of another setting" if others and len(others) < len(order) - 1 else "next"
    text = f"{text}; {which} is {other.label} with {measure.written(second)}, {lead.text(measure)}."
    return Finding("good" if lead.clear and min(found.n, second.n) > 1 else "even", text)


def _unit(measure: Measure) -> str:
    return "" if measure.unit == "share" else f" {measure.unit}"


def _at_equal_loss(done: list[Entry]) -> list[Finding]:
    """Methods compared where they reach the same task loss, on each cost: the fairest question of a sweep."""
    found = lines(done)
    if sum(len(line.entries) > 1 for line in found) < 2:
        return []
    result = []
    for along in (_first(done, (RETENTION, KNOWLEDGE)), TEXT_LOSS):
        if along is None or (at := matched(found, TASK_LOSS, along)) is None:
            continue
        (line, best), (other, second) = at.values[:2]
        lead = along.better * (best.value - second.value)
        known = best.stderr is not None and second.stderr is not None
        error = math.hypot(best.stderr or 0.0, second.stderr or 0.0) if known else None
        comparison = Comparison(lead, error)
        ahead, behind = (_read(along, value.value, value.stderr) for value in (best, second))
        text = (
            f"At a task loss of {numbers.decimal(at.across)} nats, which {len(at.values)} methods reach "
            f"between their rates, {line.label} has the best {along.title}, {ahead}; "
            f"next is {other.label} with {behind}, {comparison.text(along)}."
        )
        result.append(Finding("good" if comparison.clear and _repeated(line, other) else "even", text))
    if not result:
        result.append(
            Finding("even", "No two methods reach the same task loss: none are compared at equal loss.")
        )
    return result


def _read(measure: Measure, value: float, stderr: float | None) -> str:
    return measure.text(value) + ("" if stderr is None else f" ± {measure.error(stderr)}")


def _repeated(*found: Line) -> bool:
    return all(len(entry.finished) > 1 for line in found for entry in line.entries)


def _trade(done: list[Entry]) -> Finding | None:
    """The entries that no other beats on both: who learns little forgets little, which is no merit."""
    if len(done) < 2:
        return None
    learning = next((m for m in (PLASTICITY, TASK_LOSS) if all(m.of(entry) for entry in done)), None)
    keeping = next((m for m in (RETENTION, TEXT_LOSS) if all(m.of(entry) for entry in done)), None)
    if learning is None or keeping is None:
        return None
    best = [entry for entry in done if not any(_beats(other, entry, learning, keeping) for other in done)]
    what = f"both {learning.title} and {keeping.title}"
    if len(best) == 1:
        return Finding("even", f"By the plain numbers {best[0].label} is ahead of all others in {what}.")
    names = f"{', '.join(entry.label for entry in best[:-1])} and {best[-1].label}"
    return Finding(
        "even",
        f"Learning and keeping pull apart. By the plain numbers no other entry beats {names} in {what}.",
    )


def _beats(other: Entry, entry: Entry, *measures: Measure) -> bool:
    """Whether `other` is nowhere worse than `entry` and somewhere better."""
    leads = []
    for measure in measures:
        theirs, mine = measure.of(other), measure.of(entry)
        assert theirs is not None and mine is not None
        leads.append(measure.better * (theirs.value - mine.value))
    return min(leads) >= 0 and max(leads) > 0


def _caveats(done: list[Entry]) -> list[Finding]:
    counts = [len(entry.finished) for entry in done]
    result = []
    if min(counts) == 1:
        which = "one sequence each" if max(counts) == 1 else "only one sequence of some entries"
        which = "one sequence" if len(done) == 1 else which
        result.append(
            f"There is {which}: another seed or order may turn this round. Take it as a lead, not a result."
        )
    elif min(counts) < ENOUGH:
        result.append(f"Some entries have only {min(counts)} sequences: their spread is hardly known.")
    if len(done) > 2:
        result.append(
            f"Of {len(done)} entries the best in each measure is partly luck; the errors do not allow for it."
        )
    return [Finding("even", text) for text in result]

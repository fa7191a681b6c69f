"""Who learnt most and who forgot least, in a few careful sentences."""

from __future__ import annotations

from collections.abc import Sequence

from secura_ds.report.sequence.entries import Entry
from secura_ds.report.sequence.measures import (
    FORGETTING_DIAGONAL,
    KNOWLEDGE,
    LOSS_LEARNT,
    PLASTICITY,
    RETENTION,
    TASK_LOSS,
    TEXT_LOSS,
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
    for question, choices in (
        ("Learnt most", (PLASTICITY, LOSS_LEARNT)),
        ("Forgot least of its own tasks", (FORGETTING_DIAGONAL,)),
        ("Kept most of what the backbone knew", (RETENTION, KNOWLEDGE)),
        ("General text suffered least", (TEXT_LOSS,)),
    ):
        measure = next((choice for choice in choices if any(choice.of(entry) for entry in done)), None)
        if measure is not None:
            result.append(_finding(question, measure, done))
    if len(done) > 1 and (trade := _trade(done)):
        result.append(trade)
    return [*result, *_caveats(done)]


def _finding(question: str, measure: Measure, done: list[Entry]) -> Finding:
    order = ranked(done, measure)
    best, found = order[0]
    text = f"{best.label}: {measure.title} {measure.written(found)}{_unit(measure)}"
    if len(order) == 1:
        return Finding("even", f"{text}.")
    text = f"{question}: {text}"
    other, second = order[1]
    lead = compare(best, other, measure)
    if best.home.results.backbone != other.home.results.backbone:
        return Finding("even", f"{text}; {other.label} has another backbone, so they do not compare.")
    text = f"{text}; next is {other.label} with {measure.written(second)}, {lead.text(measure)}."
    if lead.clear and min(found.n, second.n) > 1:
        return Finding("good", text)
    return Finding("even", text)


def _unit(measure: Measure) -> str:
    return "" if measure.unit == "share" else f" {measure.unit}"


def _trade(done: list[Entry]) -> Finding | None:
    """The entries that no other beats on both: who learns little forgets little, which is no merit."""
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

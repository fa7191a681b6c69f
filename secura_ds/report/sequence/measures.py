"""The measures by which entries are judged: where each stands, how it is written, which way is better."""

from __future__ import annotations

import math
from dataclasses import dataclass

from secura_ds.continual.metrics import CLEAR, Summary
from secura_ds.report import numbers
from secura_ds.report.sequence.entries import Entry


@dataclass(frozen=True)
class Measure:
    """One metric of `sequence_metrics`. `better` is +1 where more is better, else -1."""

    keys: tuple[str, ...]
    title: str
    unit: str
    """`share` (a part of 1, as %), `points` (a difference of shares) or `nats`."""
    better: int

    def of(self, entry: Entry) -> Summary | None:
        """The measure over an entry's finished sequences."""
        return entry.summary(*self.keys)

    @property
    def axis(self) -> str:
        """Title and unit, for an axis."""
        return f"{self.title}, {'%' if self.unit == 'share' else self.unit}"

    def scaled(self, value: float) -> float:
        """A value in the unit in which it is shown."""
        return value if self.unit == "nats" else 100 * value

    def text(self, value: float, *, signed: bool | None = None) -> str:
        """A value with its unit, without its error."""
        digits = 3 if self.unit == "nats" else 1
        sign = self.unit != "share" and self.keys[-1] != "task_loss" if signed is None else signed
        unit = " %" if self.unit == "share" else ""
        return numbers.decimal(self.scaled(value), digits, signed=sign) + unit

    def written(self, found: Summary | None) -> str:
        """A value with its standard error: `+41.2 ± 1.3`."""
        if found is None:
            return numbers.MISSING
        text = self.text(found.value)
        return text if found.stderr is None else f"{text} ± {self.error(found.stderr)}"

    def error(self, stderr: float) -> str:
        """A standard error, as it is written after a value."""
        return numbers.decimal(self.scaled(stderr), 3 if self.unit == "nats" else 1)

    def size(self, value: float) -> str:
        """A difference of two values without sign, with a unit: `3.2 points`, `0.041 nats`."""
        return f"{self.text(abs(value), signed=False).removesuffix(' %')} " + (
            "nats" if self.unit == "nats" else "points"
        )


AVERAGE = Measure(("average_score",), "mean score at the end", "share", 1)
INCREMENTAL = Measure(("average_incremental_score",), "mean score along the way", "share", 1)
PLASTICITY = Measure(("plasticity",), "mean gain right after training", "points", 1)
FINAL_GAIN = Measure(("final_gain",), "mean gain left at the end", "points", 1)
BACKWARD = Measure(("backward_transfer",), "backward transfer", "points", 1)
FORWARD = Measure(("forward_transfer",), "forward transfer", "points", 1)
FORGETTING = Measure(("forgetting",), "forgetting, from the best", "points", -1)
FORGETTING_DIAGONAL = Measure(("forgetting_diagonal",), "forgetting of tasks", "points", -1)
INTRANSIGENCE = Measure(("intransigence",), "intransigence", "points", -1)
TASK_LOSS = Measure(("task_loss",), "mean task loss at the end", "nats", -1)
LOSS_LEARNT = Measure(("task_loss_change_learnt",), "task loss, change right after training", "nats", -1)
LOSS_FORGOTTEN = Measure(("task_loss_forgotten",), "task loss, rise since learnt", "nats", -1)
RETENTION = Measure(("retention",), "knowledge kept above chance", "share", 1)
KNOWLEDGE = Measure(("knowledge_change",), "change of knowledge", "points", 1)
TEXT_LOSS = Measure(("text_loss_change",), "change of general-text loss", "nats", -1)


@dataclass(frozen=True)
class Comparison:
    """How far the better of two entries is ahead, and whether beyond doubt."""

    lead: float
    stderr: float | None

    @property
    def clear(self) -> bool:
        """Whether the lead is above `CLEAR` standard errors; never with an unknown error."""
        return self.stderr is not None and self.lead > CLEAR * self.stderr

    def text(self, measure: Measure) -> str:
        """`ahead by 3.2 points ± 2.0: no clear difference`."""
        if self.stderr is None:
            return f"ahead by {measure.size(self.lead)}, its standard error is unknown"
        text = f"ahead by {measure.size(self.lead)} ± {measure.error(self.stderr)}"
        if self.clear:
            return f"{text}, more than {CLEAR:g} standard errors"
        return f"{text}: no clear difference (within {CLEAR:g} standard errors)"


def compare(best: Entry, other: Entry, measure: Measure) -> Comparison:
    """The lead of `best` over `other`, which both have the measure.

    Both started from the same backbone, whose measuring error therefore cancels. Their items are the same
    too, but the document does not list them: the error takes the rest as independent, mostly a bound from
    above.
    """
    same = best.home.results.before == other.home.results.before
    first, second = (entry.summary(*measure.keys, given_before=same) for entry in (best, other))
    assert first is not None and second is not None
    lead = measure.better * (first.value - second.value)
    if first.stderr is None or second.stderr is None:
        return Comparison(lead, None)
    return Comparison(lead, math.hypot(first.stderr, second.stderr))


def ranked(entries: list[Entry], measure: Measure) -> list[tuple[Entry, Summary]]:
    """Entries that have the measure, the best first."""
    known = [(entry, found) for entry in entries if (found := measure.of(entry)) is not None]
    return sorted(known, key=lambda pair: -measure.better * pair[1].value)

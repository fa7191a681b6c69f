"""What methods keep at the same task loss: read off their lines through the learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from secura_ds.continual.metrics import Estimate, Summary
from secura_ds.report.sequence.entries import Entry, Line
from secura_ds.report.sequence.measures import Measure


@dataclass(frozen=True)
class Matched:
    """Each line's value of one measure at the same value `across` of another, the best line first."""

    across: float
    values: tuple[tuple[Line, Estimate], ...]


def matched(found: Sequence[Line], across: Measure, along: Measure) -> Matched | None:
    """Compare lines at the value of `across` that most of them span; None if no two span the same.

    `across` must be a loss: rates spread it over decades, so distances are those of its logarithm. A line of
    one entry spans nothing. Among places of equally many lines, the middle of the widest wins.
    """
    values = [[math.log(x.value) for entry in line.entries if (x := _loss(across, entry))] for line in found]
    spans = [(min(v), max(v)) for v in values if len(v) > 1]
    edges = sorted({edge for span in spans for edge in span})
    places = [((low + high) / 2, high - low) for low, high in pairwise(edges)]
    if not places:
        return None
    place, _ = max(places, key=lambda at: (sum(low < at[0] < high for low, high in spans), at[1]))
    read = [(line, value) for line in found if (value := _at(line, place, across, along))]
    read.sort(key=lambda pair: -along.better * pair[1].value)
    return Matched(math.exp(place), tuple(read)) if len(read) > 1 else None


def _loss(across: Measure, entry: Entry) -> Summary | None:
    found = across.of(entry)
    return found if found is not None and found.value > 0 else None


def _logarithm(loss: Summary) -> Estimate:
    error = None if loss.stderr is None else loss.stderr / loss.value
    return Estimate(math.log(loss.value), error)


def _at(line: Line, place: float, across: Measure, along: Measure) -> Estimate | None:
    """The line's height at the logarithm `place`, straight between the first two rates around it.

    Its error joins those of both ends and, by the slope, those of their places. Both ends are scored on the
    same items, so it is their plain mean, not a smaller one.
    """
    points = [
        (_logarithm(x), y)
        for entry in line.entries
        if (x := _loss(across, entry)) and (y := entry.summary(*along.keys, given_before=True))
    ]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0.value == x1.value or not min(x0.value, x1.value) <= place <= max(x0.value, x1.value):
            continue
        part = (place - x0.value) / (x1.value - x0.value)
        slope = (y1.value - y0.value) / (x1.value - x0.value)
        height = y0.value + part * (y1.value - y0.value)
        errors = (x0.stderr, y0.stderr, x1.stderr, y1.stderr)
        if any(error is None for error in errors):
            return Estimate(height)
        ends = [(1 - part, x0, y0), (part, x1, y1)]
        terms = [w * math.hypot(y.stderr or 0.0, slope * (x.stderr or 0.0)) for w, x, y in ends]
        return Estimate(height, sum(terms))
    return None

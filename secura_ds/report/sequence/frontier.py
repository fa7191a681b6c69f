"""What learning costs: retention against plasticity, a point per entry, a line through a method's rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from secura_ds.continual.metrics import Summary
from secura_ds.report import numbers
from secura_ds.report.drawing import DASHES, MARKERS, Plot, Theme, legend_above, render
from secura_ds.report.sequence import measures
from secura_ds.report.sequence.entries import Entry, Line, lines
from secura_ds.report.sequence.labels import Point, label_points
from secura_ds.report.sequence.measures import Measure

WIDE = (5.2, 3.7)
WIDE_RANGE = 8.0
"""Task losses that differ by this factor are drawn on a logarithmic axis."""

KEPT = (measures.RETENTION, measures.KNOWLEDGE)


def frontier_plots(entries: Sequence[Entry], folder: Path | None) -> list[Plot]:
    """Single tasks: task loss against each cost. Sequences: mean gain against each measure of keeping."""
    plots = []
    for single in (True, False):
        ended = [entry for entry in entries if entry.single is single and entry.finished]
        group = [entry for entry in ended if _has_learnt(entry)] or ended
        learnt = (measures.TASK_LOSS, measures.FINAL_GAIN) if single else (
            measures.PLASTICITY, measures.LOSS_LEARNT)  # fmt: skip
        across = _first(group, learnt)
        if across is None:
            continue
        costs = [_first(group, KEPT), measures.TEXT_LOSS]
        costs += [] if single else [_first(group, (measures.FORGETTING_DIAGONAL, measures.LOSS_FORGOTTEN))]
        for cost in costs:
            if cost is not None and any(cost.of(entry) and across.of(entry) for entry in group):
                prefix = "rates" if single else "frontier"
                left_out = [entry.label for entry in ended if entry not in group]
                plots.append(_plot(group, across, cost, prefix, folder, left_out))
    return plots


def _has_learnt(entry: Entry) -> bool:
    """Whether tasks cost less once they are learnt; what has exploded would set the scale of all."""
    change = entry.summary("task_loss_change_learnt")
    return change is None or change.value <= 0


def _first(group: Sequence[Entry], choices: Sequence[Measure]) -> Measure | None:
    return next((measure for measure in choices if any(measure.of(entry) for entry in group)), None)


def _plot(
    group: Sequence[Entry],
    across: Measure,
    along: Measure,
    prefix: str,
    folder: Path | None,
    left_out: Sequence[str],
) -> Plot:
    found = _with_both(lines(group), across, along)
    several = any(len(line.entries) > 1 for line in found)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        points = [point for line in found for point in _draw_line(axes, line, across, along, theme, several)]
        axes.set_xlabel(_arrowed(across, "x"))
        axes.set_ylabel(_arrowed(along, "y"))
        axes.margins(0.16)
        _set_scale(axes, across, [x for x, *_ in points])
        if several:
            legend_above(figure, axes)
        if not label_points(figure, axes, points, theme) and not several:
            legend_above(figure, axes)

    alt = f"Scatter plot of {along.title} against {across.title}. " + " ".join(
        f"{entry.label}: {across.written(across.of(entry))}, {along.written(along.of(entry))}."
        for line in found
        for entry in line.entries
    )
    return render(
        draw,
        name=f"{prefix}-{along.keys[-1].replace('_', '-')}",
        title=f"{along.title[:1].upper()}{along.title[1:]}, against {across.title}",
        alt=alt,
        note="Bars are one standard error. "
        + ("Each line runs through the learning rates of one method. " if several else "")
        + (f"Not drawn, as they have learnt nothing: {', '.join(left_out)}." if left_out else ""),
        size=WIDE,
        folder=folder,
    )


def _set_scale(axes: Axes, across: Measure, xs: Sequence[float]) -> None:
    """Losses that are far apart on a logarithmic axis: else the good ones would share one place."""
    if across is not measures.TASK_LOSS or min(xs) <= 0 or max(xs) < WIDE_RANGE * min(xs):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _with_both(found: Sequence[Line], *wanted: Measure) -> list[Line]:
    """Lines of the entries that have both measures."""
    kept = [
        Line(line.label, line.index, tuple(e for e in line.entries if all(m.of(e) for m in wanted)))
        for line in found
    ]
    return [line for line in kept if line.entries]


def _draw_line(
    axes: Axes, line: Line, across: Measure, along: Measure, theme: Theme, rates: bool
) -> list[Point]:
    """A method's points with error bars, joined; returns what each is to be called.

    Args:
        rates: points are named by their learning rate, and lines by their method; else points by entry.
    """
    pairs = [(across.of(entry), along.of(entry)) for entry in line.entries]
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    xs, ys = [across.scaled(x.value) for x, _ in known], [along.scaled(y.value) for _, y in known]
    color = theme.color(line.index)
    axes.errorbar(
        xs,
        ys,
        xerr=[_error(across, x) for x, _ in known],
        yerr=[_error(along, y) for _, y in known],
        color=color,
        ecolor=color,
        elinewidth=0.9,
        marker=MARKERS[line.index % len(MARKERS)],
        markersize=6,
        markerfacecolor=color if line.index < len(MARKERS) else theme.paper,
        linestyle="none" if len(line.entries) == 1 else DASHES[line.index % len(DASHES)],
        linewidth=1.3,
        label=line.label if rates else line.entries[0].label,
        zorder=3,
    )
    names = [numbers.compact(entry.first.learning_rate) if rates else entry.label for entry in line.entries]
    return [(x, y, name, color) for x, y, name in zip(xs, ys, names, strict=True)]


def _error(measure: Measure, found: Summary) -> float:
    return math.nan if found.stderr is None else measure.scaled(found.stderr)


def _arrowed(measure: Measure, axis: str) -> str:
    """The axis label with an arrow to the better side."""
    up, down = ("→", "←") if axis == "x" else ("↑", "↓")
    return f"{measure.axis}  ({up if measure.better > 0 else down} better)"

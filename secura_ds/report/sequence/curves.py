"""Scores along the sequence: the tasks met so far, and every probe, before training and after each task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secura_ds.continual.metrics import Estimate, Summary, over_sequences, score_matrix
from secura_ds.report import numbers
from secura_ds.report.drawing import DASHES, MARKERS, WIDTH, Plot, Theme, render
from secura_ds.report.sequence.entries import Entry
from secura_ds.report.sequence.folder import Probe
from secura_ds.report.sequence.labels import Point, label_ends

Curve = list[Summary | None]
"""The value before training and after each task."""


def sequence_curves(entries: Sequence[Entry], folder: Path | None) -> list[Plot]:
    """One plot of the tasks met so far, and one per probe; none where every entry trains one task."""
    chosen = [entry for entry in entries if not entry.single and entry.begun()]
    if not chosen:
        return []
    plots = [_plot(chosen, _met_so_far, "tasks-so-far", "Tasks met so far", "mean score, %", 100, folder)]
    probes = {probe.name: probe for entry in chosen for probe in entry.probes}
    for probe in probes.values():
        choice = probe.kind == "multiple_choice"
        title = probe.name[:1].upper() + probe.name[1:].replace("_", " ")
        plots.append(
            _plot(
                chosen,
                lambda entry, name=probe.name: entry.probe_series(name),  # type: ignore[misc]
                f"probe-{list(probes).index(probe.name) + 1}",
                title,
                "right answers, %" if choice else "nats per token",
                100 if choice else 1,
                folder,
                probe=probe,
            )
        )
    return [plot for plot in plots if plot is not None]


def _met_so_far(entry: Entry) -> Curve:
    """Mean score of the tasks trained so far after each stage, over the entry's sequences."""
    length = max(len(sequence.order) for sequence in entry.sequences)
    points: list[list[Estimate]] = [[] for _ in range(length + 1)]
    tasks = [task.model_dump() for task in entry.tasks]
    for sequence in entry.sequences:
        before, stages = entry.home.results.before.model_dump(), [s.model_dump() for s in sequence.stages]
        matrix = score_matrix(before, stages, tasks, sequence.order)
        for row in range(1, len(stages) + 1):
            weights = np.zeros_like(matrix.scores)
            weights[row, :row] = 1 / row
            if estimate := matrix.weighted(weights):
                points[row].append(estimate)
    return [over_sequences(point) for point in points]


def _plot(
    entries: Sequence[Entry],
    curve: Callable[[Entry], Curve],
    name: str,
    title: str,
    label: str,
    scale: float,
    folder: Path | None,
    *,
    probe: Probe | None = None,
) -> Plot | None:
    curves = {entry.index: curve(entry) for entry in entries}
    if not any(point is not None for points in curves.values() for point in points):
        return None

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        ends = [
            end
            for entry in entries
            if (end := _draw_curve(axes, entry, curves[entry.index], scale, len(entries), theme))
        ]
        if probe is not None and probe.chance is not None:
            axes.axhline(scale * probe.chance, color=theme.ink, linestyle=(0, (3, 2)), linewidth=1)
            axes.annotate(
                "chance", (0, scale * probe.chance), (2, 3), textcoords="offset points", fontsize=8,
                color=theme.muted,
            )  # fmt: skip
        _stage_axis(axes, entries, theme)
        axes.set_ylabel(label)
        label_ends(figure, axes, ends, theme)

    return render(
        draw,
        name=name,
        title=title,
        alt=f"Line plot, {title.lower()} ({label}) along the sequence. "
        + " ".join(_spoken(entry, curves[entry.index], scale) for entry in entries),
        note="Bars are one standard error.",
        size=(WIDTH, 2.8),
        folder=folder,
    )


def _draw_curve(
    axes: Axes, entry: Entry, points: Curve, scale: float, count: int, theme: Theme
) -> Point | None:
    known = [(x, point) for x, point in enumerate(points) if point is not None]
    if not known:
        return None
    color = theme.color(entry.index)
    shift = 0.0 if count == 1 else 0.16 * (entry.index % count / (count - 1) - 0.5)
    axes.errorbar(
        [x + shift for x, _ in known],
        [scale * point.value for _, point in known],
        yerr=[math.nan if point.stderr is None else scale * point.stderr for _, point in known],
        color=color,
        linestyle=DASHES[entry.index % len(DASHES)],
        marker=MARKERS[entry.index % len(MARKERS)],
        markersize=4,
        linewidth=1.5,
        elinewidth=0.8,
        label=entry.label,
    )
    x, last = known[-1]
    return x + shift, scale * last.value, entry.label, color


def _stage_axis(axes: Axes, entries: Sequence[Entry], theme: Theme) -> None:
    """Task names where all sequences share one order and they fit, else the number of tasks trained."""
    orders = list(dict.fromkeys(order for entry in entries for order in entry.orders))
    length = max(len(order) for order in orders)
    axes.grid(axis="x", visible=False)
    if len(orders) == 1 and length <= 4 and max(len(name) for name in orders[0]) <= 9:
        axes.set_xticks(range(length + 1), ["before", *orders[0]])
        axes.set_xlabel("after the task")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
        axes.set_xlabel("tasks trained")


def _spoken(entry: Entry, points: Curve, scale: float) -> str:
    known = [point for point in points if point is not None]
    if not known:
        return ""
    first, last = (
        numbers.decimal(scale * point.value, 1 if scale > 1 else 3) for point in (known[0], known[-1])
    )
    return f"{entry.label}: from {first} to {last}."

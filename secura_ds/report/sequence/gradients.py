"""Gradient norms over training: mean, range and variance per entry (the paper's Figure 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from secura_ds.analysis.gradients import norm_statistics
from secura_ds.report import numbers
from secura_ds.report.curves import draw_line
from secura_ds.report.drawing import WIDTH, Plot, Theme, legend_above, render, step_axis
from secura_ds.report.run_folder import Series, read_log
from secura_ds.report.sequence.entries import Entry
from secura_ds.report.sequence.folder import TaskSequence
from secura_ds.report.sequence.labels import short

LARGEST = 1e100
"""Norms from here on are left out: they are a run that has failed, and their squares would overflow."""


@dataclass(frozen=True)
class Gradients:
    """L2 norms before clipping of every logged step of an entry's sequences, stage after stage."""

    entry: Entry
    sequences: list[Series]

    @property
    def values(self) -> list[float]:
        """All norms of all sequences."""
        return [value for _, values in self.sequences for value in values]


def read_gradients(entries: Sequence[Entry]) -> tuple[list[Gradients], list[str]]:
    """Norms of every entry that logged some; and the stages' logs that are missing or hold none."""
    result, missing = [], []
    for entry in entries:
        found = []
        for sequence in entry.sequences:
            series, absent = _series(entry, sequence)
            missing += absent
            if series[0]:
                found.append(series)
        if found:
            result.append(Gradients(entry, found))
    return result, missing


def _series(entry: Entry, sequence: TaskSequence) -> tuple[Series, list[str]]:
    """A sequence's norms, steps counted on from stage to stage."""
    steps: list[float] = []
    values: list[float] = []
    missing = []
    start = 0.0
    for stage, folder in entry.home.stage_folders(sequence):
        rows = [row for row in read_log(folder / "metrics.jsonl", {}) if _is_norm(row.get("grad_norm"))]
        if not rows:
            missing.append(str(folder / "metrics.jsonl"))
        steps += [start + row["step"] for row in rows]
        values += [float(row["grad_norm"]) for row in rows]
        start += stage.train.steps or (rows[-1]["step"] if rows else 0)
    return (steps, values), missing


def _is_norm(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < LARGEST


def gradient_plots(found: Sequence[Gradients], folder: Path | None) -> list[Plot]:
    """The spread of each entry's norms, and the norms over training."""
    return [_spread(found, folder), _course(found, folder)] if found else []


def _spread(found: Sequence[Gradients], folder: Path | None) -> Plot:
    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for place, gradients in enumerate(found):
            norms, color = norm_statistics(gradients.values), theme.color(gradients.entry.index)
            mean, deviation = norms.mean, norms.deviation
            axes.plot([norms.smallest, norms.largest], [place, place], color=color, linewidth=1.2)
            low = max(mean - deviation, norms.smallest)
            axes.plot(
                [low, mean + deviation], [place, place], color=color, linewidth=6, solid_capstyle="butt"
            )
            axes.plot(mean, place, "o", color=theme.paper, markeredgecolor=theme.ink, markersize=5, zorder=4)
        if any(value > 0 for gradients in found for value in gradients.values):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.compact(value)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(range(len(found)), [short(g.entry.label, 24) for g in found], color=theme.ink)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("L2 norm before clipping")

    alt = "Range plot of gradient norms. " + " ".join(
        f"{row[0]}: mean {row[1]}, from {row[4]} to {row[5]}." for row in gradient_table(found)[1]
    )
    return render(
        draw,
        name="gradient-spread",
        title="Gradient norms: mean, spread and range",
        alt=alt,
        note="Dot: mean over all steps. Thick: one standard deviation around it. Thin: smallest to largest.",
        size=(WIDTH, 0.9 + 0.3 * len(found)),
        folder=folder,
    )


def _course(found: Sequence[Gradients], folder: Path | None) -> Plot:
    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for gradients in found:
            draw_line(axes, gradients.sequences[0], theme, gradients.entry.index, gradients.entry.label)
        if any(value > 0 for gradients in found for value in gradients.values):
            axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.compact(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("L2 norm before clipping")
        step_axis(axes)
        legend_above(figure, axes)

    alt = "Line plot of gradient norms over all stages. " + " ".join(
        f"{g.entry.label}: {g.sequences[0][1][0]:.3g} at first, {g.sequences[0][1][-1]:.3g} at last."
        for g in found
    )
    several = any(len(g.sequences) > 1 for g in found)
    return render(
        draw,
        name="gradient-course",
        title="Gradient norms over training",
        alt=alt,
        note="The first sequence of each entry, stage after stage." if several else "Stage after stage.",
        folder=folder,
    )


def gradient_table(found: Sequence[Gradients]) -> tuple[list[str], list[list[str]]]:
    """Mean, variance, standard deviation and range of the norms, over all steps of all sequences."""
    rows = []
    for gradients in found:
        norms = norm_statistics(gradients.values)
        shown = (norms.mean, norms.variance, norms.deviation, norms.smallest, norms.largest)
        rows.append([gradients.entry.label, *(numbers.compact(v) for v in shown), numbers.count(norms.steps)])
    headers = ["Entry", "Mean", "Variance", "Standard deviation", "Smallest", "Largest", "Steps logged"]
    return headers, rows

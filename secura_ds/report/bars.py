"""Scores before and after training as bars with standard errors and chance levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secura_ds.report.drawing import WIDTH, Plot, Theme, legend_above, render
from secura_ds.report.numbers import decimal
from secura_ds.report.run_folder import RunFolder
from secura_ds.report.scores import Score, all_scores


@dataclass(frozen=True)
class _Bar:
    """One bar of every group: a run's scores before or after, or the common start of all runs."""

    label: str
    scores: dict[str, Score]
    run: int | None
    """Which run's colour; None for the grey of a common start."""
    pale: bool = False


def score_bars(runs: Sequence[RunFolder], folder: Path | None) -> list[Plot]:
    """Right-answer scores before and after, and the change of text losses; [] without an evaluation."""
    plots = []
    bars = _bars(runs)
    names = _names(bars, lambda score: score.kind != "text")
    if names:
        plots.append(_scores(bars, names, folder))
    changes = _changes(runs)
    if any(row for _, row in changes):
        plots.append(_losses(changes, folder))
    return plots


def _bars(runs: Sequence[RunFolder]) -> list[_Bar]:
    befores = [all_scores(run.before) for run in runs]
    afters = [all_scores(run.after) for run in runs]
    known = [scores for scores in befores if scores]
    several = len(runs) > 1
    bars: list[_Bar] = []
    if known and all(scores == known[0] for scores in known):
        bars.append(_Bar("before", known[0], None))
    else:
        bars += [
            _Bar(f"{run.label}, before", s, i, True)
            for i, (run, s) in enumerate(zip(runs, befores, strict=True))
            if s
        ]
    bars += [
        _Bar(run.label if several else "after", s, i)
        for i, (run, s) in enumerate(zip(runs, afters, strict=True))
        if s
    ]
    return bars


def _names(bars: Sequence[_Bar], wanted: Callable[[Score], bool]) -> list[str]:
    return list(dict.fromkeys(n for bar in bars for n, score in bar.scores.items() if wanted(score)))


def _scores(bars: Sequence[_Bar], names: Sequence[str], folder: Path | None) -> Plot:
    shown = {name: next(bar.scores[name] for bar in bars if name in bar.scores) for name in names}

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        width = 0.8 / len(bars)
        for place, bar in enumerate(bars):
            offset = (place - (len(bars) - 1) / 2) * width
            group = [(x, bar.scores[name]) for x, name in enumerate(names) if name in bar.scores]
            _draw_bars(axes, theme, bar, [(x + offset, s) for x, s in group], width * 0.92)
        for x, score in enumerate(shown.values()):
            if score.chance is not None:
                label = "chance level" if x == _first_chance(shown) else ""
                y = _percent(score, score.chance)
                axes.hlines(
                    y,
                    x - 0.45,
                    x + 0.45,
                    colors=theme.ink,
                    linestyles=(0, (3, 2)),
                    linewidth=1.2,
                    label=label,
                )
        axes.set_xticks(range(len(names)), [_tick(score) for score in shown.values()], color=theme.ink)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel(
            "score, % (or points)" if any(s.unit == "points" for s in shown.values()) else "score, %"
        )
        axes.set_ylim(0, 108)
        axes.set_yticks(range(0, 101, 20))
        axes.grid(axis="x", visible=False)
        legend_above(figure, axes)

    alt = "Bar plot of scores. " + " ".join(
        f"{_tick(shown[name])}: "
        + ", ".join(f"{b.label} {b.scores[name].text()}" for b in bars if name in b.scores)
        + "."
        for name in names
    )
    note = "Error bars are one standard error."
    return render(draw, name="scores", title="Task and retention", alt=alt, note=note, folder=folder)


def _draw_bars(axes: Axes, theme: Theme, bar: _Bar, group: list[tuple[float, Score]], width: float) -> None:
    color = theme.before if bar.run is None else theme.color(bar.run)
    heights = [_percent(score, score.value) for _, score in group]
    axes.bar(
        [x for x, _ in group],
        heights,
        width,
        color=color,
        alpha=0.4 if bar.pale else 1.0,
        label=bar.label,
        yerr=[math.nan if score.stderr is None else _percent(score, score.stderr) for _, score in group],
        error_kw={"ecolor": theme.ink, "elinewidth": 1.1, "capsize": 2.5},
    )
    if width > 0.13:
        for (x, score), height in zip(group, heights, strict=True):
            top = height + _percent(score, score.stderr or 0.0)
            axes.annotate(
                f"{height:.0f}", (x, top), (0, 2), textcoords="offset points", ha="center", fontsize=8
            )


def _first_chance(shown: dict[str, Score]) -> int:
    return next(index for index, score in enumerate(shown.values()) if score.chance is not None)


def _percent(score: Score, value: float) -> float:
    return 100 * value if score.unit == "share" else value


def _tick(score: Score) -> str:
    name = score.label if score.kind != "task" else score.label.replace("Task: ", "task:\n")
    return name.replace("_", " ")


def _changes(runs: Sequence[RunFolder]) -> list[tuple[str, dict[str, tuple[float, float | None]]]]:
    """Per run its label, and per text its change of loss with the error over the same windows, if known."""
    result = []
    for run in runs:
        before, after = all_scores(run.before), all_scores(run.after)
        row = {
            _tick(score): (score.change(before[name]), score.paired_stderr(before[name]))
            for name, score in after.items()
            if score.kind == "text" and name in before
        }
        result.append((run.label, row))
    return result


def _losses(changes: list[tuple[str, dict[str, tuple[float, float | None]]]], folder: Path | None) -> Plot:
    names = list(dict.fromkeys(name for _, row in changes for name in row))
    height = 0.8 / len(changes)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for place, (label, row) in enumerate(changes):
            offset = (place - (len(changes) - 1) / 2) * height
            spots = [(names.index(name) + offset, *change) for name, change in row.items()]
            _draw_changes(axes, theme, spots, height, theme.color(place), label)
        axes.axvline(0, color=theme.ink, linewidth=1.1)
        axes.set_yticks(range(len(names)), names, color=theme.ink)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.margins(x=0.3)
        axes.set_xlabel("change of loss, nats per token")
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        legend_above(figure, axes)

    alt = "Bar plot of the change of mean token loss on text it was not trained on. " + " ".join(
        f"{label}: "
        + ", ".join(f"{name} {decimal(change, signed=True)}" for name, (change, _) in row.items())
        + "."
        for label, row in changes
    )
    known = any(error is not None for _, row in changes for _, error in row.values())
    return render(
        draw,
        name="text-loss",
        title="General text: change of loss",
        alt=alt,
        note="Error bars are one standard error, paired over the same windows of text." if known else "",
        size=(WIDTH, 1.0 + 0.42 * len(names) * max(1.0, 0.6 * len(changes))),
        folder=folder,
    )


def _draw_changes(
    axes: Axes,
    theme: Theme,
    spots: list[tuple[float, float, float | None]],
    height: float,
    color: str,
    label: str,
) -> None:
    axes.barh(
        [y for y, _, _ in spots],
        [change for _, change, _ in spots],
        height * 0.9,
        color=color,
        label=label,
        xerr=[math.nan if error is None else error for _, _, error in spots],
        error_kw={"ecolor": theme.ink, "elinewidth": 1.1, "capsize": 2.5},
    )
    for y, change, error in spots:
        side = 1 if change >= 0 else -1
        axes.annotate(
            decimal(change, signed=True),
            (change + side * (error or 0.0), y),
            (4 * side, 0),
            textcoords="offset points",
            va="center",
            ha="left" if change >= 0 else "right",
            fontsize=8,
        )

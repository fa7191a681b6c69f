"""Training curves: loss, learning rate, gradient norm, speed and memory over optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from secura_ds.report import numbers
from secura_ds.report.drawing import DASHES, MARKERS, Plot, Theme, legend_above, render, step_axis
from secura_ds.report.run_folder import RunFolder, Series

SMOOTH_FROM = 60
"""Noisy curves of at least this many points also get a moving mean."""

STEADY = ("learning_rate", "memory_bytes")
"""Quantities that are drawn as they are, however long."""

CURVES = (
    # key, title, axis label, scale
    ("learning_rate", "Learning rate", "learning rate", 1.0),
    ("grad_norm", "Gradient norm", "L2 norm before clipping", 1.0),
    ("tokens_per_second", "Speed", "tokens per second", 1.0),
    ("memory_bytes", "Memory", "GiB, busiest process", 2.0**-30),
)


def training_curves(runs: Sequence[RunFolder], folder: Path | None) -> list[Plot]:
    """The loss and every other logged quantity that at least one run has."""
    plots = (
        [_loss(runs, folder)]
        if any(run.series(key)[0] for run in runs for key in ("loss", "eval_loss"))
        else []
    )
    for key, title, label, scale in CURVES:
        series = {index: run.series(key, scale=scale) for index, run in enumerate(runs)}
        if any(values for _, values in series.values()):
            plots.append(_curve(runs, series, key, title, label, folder))
    return plots


def _loss(runs: Sequence[RunFolder], folder: Path | None) -> Plot:
    several = len(runs) > 1

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for index, run in enumerate(runs):
            draw_line(axes, run.series("loss"), theme, index, run.label if several else "training")
            steps, values = run.series("eval_loss")
            if values:
                axes.plot(
                    steps,
                    values,
                    color=theme.color(index if several else 1),
                    linestyle=(0, (2, 1.5)),
                    linewidth=1.2,
                    marker=MARKERS[index % len(MARKERS)],
                    markersize=5,
                    markeredgecolor=theme.paper,
                    label=None if several else "validation",
                    zorder=4,
                )
        if several and any(run.series("eval_loss")[0] for run in runs):
            axes.plot([], [], "o", color=theme.muted, markersize=5, label="validation (markers)")
        axes.set_ylabel("nats per token")
        step_axis(axes)
        legend_above(figure, axes)

    parts = [
        _spoken(run, "loss", "training loss") + _spoken(run, "eval_loss", "validation loss") for run in runs
    ]
    return render(
        draw, name="loss", title="Loss", alt="Line plot of the loss. " + "".join(parts), folder=folder
    )


def _curve(
    runs: Sequence[RunFolder],
    series: dict[int, Series],
    key: str,
    title: str,
    label: str,
    folder: Path | None,
) -> Plot:
    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for index, run in enumerate(runs):
            draw_line(axes, series[index], theme, index, run.label, noisy=key not in STEADY)
        axes.set_ylabel(label)
        if key == "learning_rate":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.compact(value)))
        if key in ("tokens_per_second", "memory_bytes"):
            axes.set_ylim(0, 1.1 * max(value for _, values in series.values() for value in values))
        step_axis(axes)
        legend_above(figure, axes)

    alt = f"Line plot of {title.lower()} ({label}). " + "".join(
        _spoken(run, key, title.lower()) for run in runs
    )
    return render(draw, name=key.replace("_", "-"), title=title, alt=alt, folder=folder)


def draw_line(
    axes: Axes, series: Series, theme: Theme, index: int, label: str, *, noisy: bool = True
) -> None:
    """A run's line in its colour and dash; long noisy series are drawn pale under a moving mean."""
    steps, values = series
    if not values:
        return
    style: dict[str, Any] = {"color": theme.color(index), "linestyle": DASHES[index % len(DASHES)]}
    marker = "o" if len(values) == 1 else None
    if len(values) < SMOOTH_FROM or not noisy:
        axes.plot(steps, values, label=label, marker=marker, **style)
        return
    axes.plot(steps, values, color=theme.color(index), alpha=0.3, linewidth=0.8)
    axes.plot(steps, moving_mean(values, len(values) // 25), label=label, **style)


def moving_mean(values: Sequence[float], width: int) -> np.ndarray:
    """Centred mean over up to `width` neighbours, fewer at both ends: as long as `values`."""
    half = max(1, width) // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _spoken(run: RunFolder, key: str, name: str) -> str:
    scale = 2.0**-30 if key == "memory_bytes" else 1.0
    steps, values = run.series(key, scale=scale)
    if not values:
        return ""
    return (
        f"{run.label}: {name} {values[0]:.3g} at step {steps[0]:g}, {values[-1]:.3g} at step {steps[-1]:g}. "
    )

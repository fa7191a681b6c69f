"""What S-MagNorm did to each layer: heat maps over layers and steps, the last step beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from secura_ds.report import numbers
from secura_ds.report.curves import draw_line
from secura_ds.report.drawing import COLORMAP, WIDTH, Plot, Theme, legend_above, render, step_axis
from secura_ds.report.run_folder import RunFolder, Series

MAX_COLUMNS = 240
"""More recorded steps than this are thinned out evenly: a pixel can show no more."""


@dataclass(frozen=True)
class _Statistic:
    """How one quantity of `statistics.jsonl` is drawn."""

    key: str
    title: str
    note: str
    logarithmic: bool = False
    from_zero: bool = False


STATISTICS = (
    _Statistic(
        "relative_change",
        "Relative change of the weights",
        "Frobenius norm of the change, over that of the pretrained weight.",
        from_zero=True,
    ),
    _Statistic(
        "limiter_mean",
        "Mean limiter M",
        "The update of a weight is divided by M: 1 keeps it whole, 2 halves it.",
    ),
    _Statistic(
        "ratio_max",
        "Largest ratio |D| / (|W| + eps)",
        "The element that changed most relative to itself; it sets the scale for all others of its layer.",
        logarithmic=True,
    ),
)


@dataclass(frozen=True)
class _Panel:
    """One kind of module: `values` is (blocks, steps), nan where nothing was recorded."""

    kind: str
    blocks: list[int]
    steps: list[float]
    values: np.ndarray


def layer_plots(runs: Sequence[RunFolder], folder: Path | None) -> list[tuple[str, list[Plot]]]:
    """Per run with statistics, its label and one figure per statistic; several runs also get one overlay."""
    result: list[tuple[str, list[Plot]]] = []
    recorded = [index for index, run in enumerate(runs) if run.statistics]
    if len(recorded) > 1:
        result.append(("All runs", [_overlay(runs, folder)]))
    for index in recorded:
        prefix = f"run{index + 1}-" if len(runs) > 1 else ""
        plots = [_statistic(runs[index], statistic, prefix, folder) for statistic in STATISTICS]
        result.append((runs[index].label, [plot for plot in plots if plot is not None]))
    return result


def split_name(name: str) -> tuple[str, int | None]:
    """Module kind and block number of a layer: `model.layers.3.self_attn.q_proj` is `("q_proj", 3)`."""
    parts = name.split(".")
    block = next((int(part) for part in parts if part.isdigit()), None)
    return parts[-1], block


def _panels(layers: dict[str, Series]) -> list[_Panel]:
    """Layers grouped by module kind, in the order in which the model names them."""
    groups: dict[str, dict[int, Series]] = {}
    for name, series in layers.items():
        kind, block = split_name(name)
        group = groups.setdefault(kind, {})
        group[len(group) if block is None or block in group else block] = series
    steps = sorted({step for steps, _ in layers.values() for step in steps})
    if len(steps) > MAX_COLUMNS:
        steps = [steps[i] for i in np.linspace(0, len(steps) - 1, MAX_COLUMNS).round().astype(int)]
    column = {step: index for index, step in enumerate(steps)}
    panels = []
    for kind, group in groups.items():
        blocks = sorted(group)
        values = np.full((len(blocks), len(steps)), np.nan)
        for row, block in enumerate(blocks):
            for step, value in zip(*group[block], strict=True):
                if step in column:
                    values[row, column[step]] = value
        panels.append(_Panel(kind, blocks, steps, values))
    return panels


def _statistic(run: RunFolder, statistic: _Statistic, prefix: str, folder: Path | None) -> Plot | None:
    panels = _panels(run.layer_series(statistic.key))
    if not panels:
        return None
    norm = _norm(np.concatenate([panel.values.ravel() for panel in panels]), statistic)

    def draw(figure: Figure, theme: Theme) -> None:
        grid = figure.subplots(
            len(panels), 2, squeeze=False, sharex="col", sharey="row", gridspec_kw={"width_ratios": (3, 1)}
        )
        for (heat, end), panel in zip(grid, panels, strict=True):
            image = _heat(heat, panel, norm, theme)
            _last_step(end, panel, statistic, theme)
        step_axis(grid[-1][0])
        grid[-1][1].set_xlabel("last step")
        bar = figure.colorbar(
            image,
            ax=list(grid.ravel()),
            location="top",
            aspect=40,
            pad=0.02,
            format=_tick_format(statistic),
        )
        bar.outline.set_visible(False)

    height = 1.1 + len(panels) * (1.6 if len(panels) <= 2 else 1.2)
    return render(
        draw,
        name=f"{prefix}{statistic.key.replace('_', '-')}",
        title=statistic.title,
        alt=_spoken(statistic.title, panels),
        note=statistic.note,
        size=(WIDTH, height),
        folder=folder,
    )


def _tick_format(statistic: _Statistic) -> Formatter:
    if statistic.logarithmic:
        return FuncFormatter(lambda value, _: numbers.compact(value))
    return ScalarFormatter(useOffset=False)


def _norm(values: np.ndarray, statistic: _Statistic) -> Normalize:
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    if statistic.logarithmic and positive.size:
        # Everything starts at zero; five decades below the top are enough to see who moves.
        return LogNorm(max(positive.min(), positive.max() * 1e-5), positive.max(), clip=True)
    return Normalize(0.0 if statistic.from_zero else float(finite.min()), float(finite.max()))


def _heat(axes: Axes, panel: _Panel, norm: Normalize, theme: Theme) -> QuadMesh:
    axes.grid(visible=False)
    image = axes.pcolormesh(
        _edges(panel.steps),
        _edges([float(block) for block in panel.blocks]),
        np.ma.masked_invalid(panel.values),
        norm=norm,
        cmap=COLORMAP,
        rasterized=True,
    )
    axes.set_title(panel.kind, color=theme.ink)
    axes.set_ylabel("layer")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return image


def _last_step(axes: Axes, panel: _Panel, statistic: _Statistic, theme: Theme) -> None:
    """The last recorded value of each layer: bars where zero is the natural start, else points."""
    last = np.array([next((v for v in row[::-1] if np.isfinite(v)), np.nan) for row in panel.values])
    if statistic.from_zero:
        axes.barh(panel.blocks, last, height=0.8, color=theme.color(0))
    else:
        axes.plot(last, panel.blocks, "o", markersize=2.6, color=theme.color(0))
        axes.margins(x=0.15)
    if statistic.logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(LogLocator(numticks=3))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=2 if statistic.from_zero else 1))
    axes.xaxis.set_major_formatter(_tick_format(statistic))
    axes.tick_params(axis="y", labelleft=False, length=0)
    axes.grid(axis="y", visible=False)


def _edges(centers: Sequence[float]) -> np.ndarray:
    """Cell borders half way between centres; one centre gets a width of 1."""
    middle = np.asarray(centers, dtype=float)
    if len(middle) == 1:
        return np.array([middle[0] - 0.5, middle[0] + 0.5])
    between = (middle[1:] + middle[:-1]) / 2
    return np.concatenate([[2 * middle[0] - between[0]], between, [2 * middle[-1] - between[-1]]])


def _overlay(runs: Sequence[RunFolder], folder: Path | None) -> Plot:
    means = {index: _mean_series(run.layer_series("relative_change")) for index, run in enumerate(runs)}

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for index, run in enumerate(runs):
            draw_line(axes, means[index], theme, index, run.label)
        axes.set_ylabel("relative change")
        axes.set_ylim(bottom=0)
        step_axis(axes)
        legend_above(figure, axes)

    alt = "Line plot of the relative change of the weights, mean over layers. " + "".join(
        f"{run.label}: {means[index][1][-1]:.3g} at the end. "
        for index, run in enumerate(runs)
        if means[index][1]
    )
    return render(
        draw,
        name="relative-change",
        title="Relative change of the weights",
        alt=alt,
        note="Mean over all adapted layers.",
        folder=folder,
    )


def _mean_series(layers: dict[str, Series]) -> Series:
    by_step: dict[float, list[float]] = {}
    for steps, values in layers.values():
        for step, value in zip(steps, values, strict=True):
            by_step.setdefault(step, []).append(value)
    steps = sorted(by_step)
    return steps, [float(np.mean(by_step[step])) for step in steps]


def _spoken(title: str, panels: Sequence[_Panel]) -> str:
    parts = [f"Heat map of layer against step with bars for the last step: {title}."]
    for panel in panels:
        last = panel.values[:, -1]
        if np.isfinite(last).any():
            low, high = (numbers.compact(value) for value in (np.nanmin(last), np.nanmax(last)))
            top = panel.blocks[int(np.nanargmax(last))]
            parts.append(f"{panel.kind}: from {low} to {high} at the end, most in layer {top}.")
    return " ".join(parts)

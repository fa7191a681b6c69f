"""What S-MagNorm did to each layer: heat maps over layers and steps, with the last step as bars beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secura_ds.report import numbers
from secura_ds.report.curves import draw_line
from secura_ds.report.drawing import Plot, Theme, legend_above, render, step_axis
from secura_ds.report.run_folder import RunFolder, Series

MAX_COLUMNS = 240
"""More recorded steps than this are thinned out evenly: a pixel can show no more."""

LOG_RANGE = 30.0
"""Values that span more than this factor get a logarithmic colour scale."""

STATISTICS = (
    # key, title, note
    (
        "relative_change",
        "Relative change of the weights",
        "Frobenius norm of the change, over that of the pretrained weight.",
    ),
    ("limiter_mean", "Mean limiter M", "The update of a weight is divided by M: 1 keeps it whole, 2 halves it."),
    ("ratio_max", "Largest ratio |D| / (|W| + eps)", "The element that changed most relative to itself; it sets the scale for all others of its layer."),
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
        plots = [_statistic(runs[index], *statistic, prefix, folder) for statistic in STATISTICS]
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


def _statistic(run: RunFolder, key: str, title: str, note: str, prefix: str, folder: Path | None) -> Plot | None:
    panels = _panels(run.layer_series(key))
    if not panels:
        return None
    norm = _norm(np.concatenate([panel.values.ravel() for panel in panels]))

    def draw(figure: Figure, theme: Theme) -> None:
        grid = figure.subplots(
            len(panels), 2, squeeze=False, sharex="col", sharey="row", gridspec_kw={"width_ratios": (3, 1)}
        )
        image = None
        for (heat, bars), panel in zip(grid, panels, strict=True):
            image = _heat(heat, panel, norm, theme)
            _final(bars, panel, norm, theme)
        step_axis(grid[-1][0])
        grid[-1][1].set_xlabel("at the end")
        figure.colorbar(image, ax=list(grid.ravel()), location="top", aspect=45, pad=0.02).outline.set_visible(False)

    name = f"{prefix}{key.replace('_', '-')}"
    height = 1.15 + len(panels) * (1.75 if len(panels) <= 2 else 1.25)
    return render(
        draw, name=name, title=title, alt=_spoken(title, panels), note=note, size=(4.8, height), folder=folder
    )


def _norm(values: np.ndarray) -> Normalize:
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    if positive.size and positive.max() > LOG_RANGE * positive.min():
        # Everything starts at zero; five decades below the top are enough to see who moves.
        return LogNorm(max(positive.min(), positive.max() * 1e-5), positive.max(), clip=True)
    return Normalize(float(finite.min()), float(finite.max()))


def _heat(axes: Axes, panel: _Panel, norm: Normalize, theme: Theme) -> object:
    axes.grid(visible=False)
    image = axes.pcolormesh(
        _edges(panel.steps),
        _edges([float(block) for block in panel.blocks]),
        np.ma.masked_invalid(panel.values),
        norm=norm,
        cmap=theme.colormap,
        rasterized=True,
    )
    axes.set_title(panel.kind, color=theme.ink)
    axes.set_ylabel("layer")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return image


def _final(axes: Axes, panel: _Panel, norm: Normalize, theme: Theme) -> None:
    last = np.array([next((v for v in row[::-1] if np.isfinite(v)), np.nan) for row in panel.values])
    if isinstance(norm, LogNorm):
        axes.set_xscale("log")
        axes.set_xlim(norm.vmin, norm.vmax)
    elif norm.vmin is not None and norm.vmin >= 1:
        axes.set_xlim(1, 2)
    axes.barh(panel.blocks, last, height=0.8, color=theme.color(0))
    axes.tick_params(axis="y", labelleft=False)
    axes.grid(axis="y", visible=False)
    if not isinstance(norm, LogNorm):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=2))


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
        axes.set_ylabel("relative change, mean over layers")
        axes.set_ylim(bottom=0)
        step_axis(axes)
        legend_above(figure, axes, columns=2)

    alt = "Line plot of the relative change of the weights, mean over layers. " + "".join(
        f"{run.label}: {means[index][1][-1]:.3g} at the end. " for index, run in enumerate(runs) if means[index][1]
    )
    return render(draw, name="relative-change", title="Relative change of the weights", alt=alt, folder=folder)


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
            low, high = np.nanmin(last), np.nanmax(last)
            top = panel.blocks[int(np.nanargmax(last))]
            parts.append(
                f"{panel.kind}: from {numbers.compact(low)} to {numbers.compact(high)} at the end, most in layer {top}."
            )
    return " ".join(parts)

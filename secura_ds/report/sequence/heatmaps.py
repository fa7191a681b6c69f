"""The score matrix of each entry as a heat map: rows after each task, columns tasks, then probes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from secura_ds.continual.metrics import ScoreMatrix
from secura_ds.report import numbers
from secura_ds.report.drawing import COLORMAP, WIDTH, Plot, Theme, render
from secura_ds.report.sequence.entries import Entry
from secura_ds.report.sequence.labels import short

CELL = (0.44, 0.25)
"""Width and height of a cell, inches: room for a number."""

ON_DARK, ON_LIGHT = "#fefefe", "#0e1116"
"""Colours of numbers in cells; no colour of a theme, which would be exchanged on dark pages."""


@dataclass(frozen=True)
class _Block:
    """Neighbouring columns of one unit. The arrays are (rows, columns); `shades` lie in 0..1 or are nan."""

    names: list[str]
    values: np.ndarray
    errors: np.ndarray
    shades: np.ndarray
    digits: int
    scale: float
    """What a value is multiplied by to be written."""


def heat_maps(entries: Sequence[Entry], folder: Path | None) -> list[Plot]:
    """A map for every entry and order of tasks; none for entries of one task alone."""
    plots = []
    for entry in entries:
        for number, order in enumerate(entry.orders):
            if len(order) > 1 and entry.begun(order):
                plots.append(_heat_map(entry, order, number, folder))
    return plots


def _heat_map(entry: Entry, order: tuple[str, ...], number: int, folder: Path | None) -> Plot:
    matrix = entry.matrix(order)
    by_loss = not np.isfinite(matrix.scores).any()
    if by_loss:
        matrix = entry.matrix(order, "loss")
    blocks = [_task_block(matrix, by_loss), *_probe_blocks(entry, order)]
    columns = sum(len(block.names) for block in blocks)
    name_length = max(len(short(name, 16)) for name in order)
    size = (
        max(WIDTH, 0.45 + 0.075 * (name_length + 7) + CELL[0] * columns + 0.14 * len(blocks)),
        0.75 + 0.06 * min(16, max(len(name) for block in blocks for name in block.names))
        + CELL[1] * (len(order) + 1),
    )  # fmt: skip

    def draw(figure: Figure, theme: Theme) -> None:
        grid = figure.subplots(
            1, len(blocks), squeeze=False, gridspec_kw={"width_ratios": [len(b.names) for b in blocks]}
        )[0]
        for place, (axes, block) in enumerate(zip(grid, blocks, strict=True)):
            _draw_block(axes, block, theme)
            labels = ["before", *(f"after {short(name, 16)}" for name in order)] if place == 0 else []
            axes.set_yticks(range(len(labels)), labels, color=theme.ink)
        for row in range(1, len(order) + 1):
            # A pale line under the dark one: the frame shows on every colour.
            for color, width in ((theme.paper, 2.6), (theme.ink, 1.2)):
                frame = Rectangle((row - 1.45, row - 0.45), 0.9, 0.9, fill=False, ec=color, lw=width)
                grid[0].add_patch(frame)

    seeds = sum(tuple(sequence.order) == order for sequence in entry.sequences)
    mean = f"Mean of {seeds} sequences. " if seeds > 1 else ""
    errors = matrix.errors[np.isfinite(matrix.errors)]
    if errors.size:
        size_of_error = (
            numbers.decimal(float(errors.max())) if by_loss else f"{100 * errors.max():.1f} points"
        )
        mean += f"Standard errors of task scores: up to {size_of_error}. "
    several = len(entry.orders) > 1
    return render(
        draw,
        name=f"matrix-{entry.index + 1}" + (f"-order{number + 1}" if several else ""),
        title=entry.label + (f", order {number + 1}" if several else ""),
        alt=_spoken(entry, order, matrix, by_loss),
        note=f"{mean}Framed: a task right after its own training. "
        + ("Tasks: mean token loss, nats." if by_loss else "Tasks and knowledge in %, text loss in nats."),
        size=size,
        folder=folder,
    )


def _task_block(matrix: ScoreMatrix, by_loss: bool) -> _Block:
    scores = matrix.scores
    shades = scores
    if by_loss:
        finite = scores[np.isfinite(scores)]
        shades = 1 - Normalize(*((finite.min(), finite.max()) if finite.size else (0, 1)))(scores).filled(
            np.nan
        )
    names = list(matrix.tasks)
    return _Block(names, scores, matrix.errors, shades, 2 if by_loss else 0, 1 if by_loss else 100)


def _probe_blocks(entry: Entry, order: tuple[str, ...]) -> list[_Block]:
    blocks = []
    for kind in ("multiple_choice", "text_loss"):
        names = [probe.name for probe in entry.probes if probe.kind == kind]
        values = np.full((len(order) + 1, len(names)), np.nan)
        errors = values.copy()
        for column, name in enumerate(names):
            for row, point in enumerate(entry.probe_series(name, order)[: len(order) + 1]):
                if point is not None:
                    values[row, column] = point.value
                    errors[row, column] = np.nan if point.stderr is None else point.stderr
        if not np.isfinite(values).any():
            continue
        choice = kind == "multiple_choice"
        # One nat above the loss before, a perplexity 2.7 times as high, is as dark as it gets.
        shades = values if choice else 1 - np.clip(values - values[:1], 0, 1)
        blocks.append(_Block(names, values, errors, shades, 0 if choice else 2, 100 if choice else 1))
    return blocks


def _draw_block(axes: Axes, block: _Block, theme: Theme) -> None:
    rows, columns = block.values.shape
    axes.grid(visible=False)
    axes.pcolormesh(
        np.arange(columns + 1) - 0.5,
        np.arange(rows + 1) - 0.5,
        np.ma.masked_invalid(block.shades),
        vmin=0,
        vmax=1,
        cmap=COLORMAP,
        rasterized=True,
    )
    for row, column in np.ndindex(rows, columns):
        value, shade = block.values[row, column], block.shades[row, column]
        known = bool(np.isfinite(value))
        text = numbers.decimal(float(block.scale * value), block.digits) if known else numbers.MISSING
        ink = theme.muted if not known else ON_LIGHT if shade > 0.6 else ON_DARK
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=ink)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xticks(
        range(columns), [_head(name) for name in block.names], rotation=40, ha="left",
        rotation_mode="anchor", color=theme.ink,
    )  # fmt: skip
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=2)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _head(name: str) -> str:
    return short(name.replace("_", " "), 16)


def _spoken(entry: Entry, order: tuple[str, ...], matrix: ScoreMatrix, by_loss: bool) -> str:
    parts = [f"Heat map of {entry.label}, trained on {textwrap.shorten(', '.join(order), 300)}."]
    for column, name in enumerate(matrix.tasks):
        values = [matrix.scores[row, column] for row in (0, column + 1, len(order))]
        texts = [numbers.decimal(v) if by_loss else numbers.share(v) for v in values]
        parts.append(f"{name}: {texts[0]} before, {texts[1]} when learnt, {texts[2]} at the end.")
    return " ".join(parts)

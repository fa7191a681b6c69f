"""One look for all plots, in light and in dark, without lasting changes to matplotlib's settings."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secura_ds.files import atomic_write_bytes

MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", (0, (5, 1.6)), (0, (1.4, 1.3)), (0, (6, 1.5, 1.4, 1.5)))
"""Runs differ in marker and dash as well as in colour."""

WIDTH = 3.9
"""Inches. About the width of a phone, so that a plot is read at its drawn size wherever it stands."""

LABEL_LENGTH = 44
LEGEND_ROW = 0.19
"""Height of one more line of a legend, inches."""

PIXELS_PER_INCH = 96
PNG_DPI = 160


@dataclass(frozen=True)
class Theme:
    """Colours of one look. `series` is Okabe and Ito's colour-blind-safe set, lightened for dark pages."""

    ink: str
    muted: str
    grid: str
    paper: str
    before: str
    series: tuple[str, ...]

    def color(self, index: int) -> str:
        """Colour of run or series number `index`."""
        return self.series[index % len(self.series)]


LIGHT = Theme(
    ink="#1c2330",
    muted="#5b6472",
    grid="#e3e6ea",
    paper="#ffffff",
    before="#b4bac4",
    series=("#0072b2", "#d55e00", "#009e73", "#aa4499", "#b58900", "#3b8fc4"),
)
DARK = Theme(
    ink="#e8eaee",
    muted="#a3acb9",
    grid="#343b46",
    paper="#1b2028",
    before="#6b7482",
    series=("#56b4e9", "#ff9a4d", "#3cc9a0", "#e39ad0", "#e8c34a", "#9fd0f2"),
)

COLORMAP = "viridis"
"""Legible in both looks, in grey and to the colour-blind."""

Draw = Callable[[Figure, Theme], None]


@dataclass(frozen=True)
class Plot:
    """A finished plot as two data URIs, with what the page says about it."""

    name: str
    title: str
    alt: str
    note: str
    light: str
    dark: str
    width: int
    height: int


def render(
    draw: Draw,
    *,
    name: str,
    title: str,
    alt: str,
    folder: Path | None,
    note: str = "",
    size: tuple[float, float] = (WIDTH, 2.6),
) -> Plot:
    """Draw a figure for light and dark pages; the light one also goes to `folder`/`name`.png.

    Args:
        draw: Fills an empty figure in a theme's colours.
        name: File stem of the PNG.
        title: Heading on the page (the figure itself carries none).
        alt: The plot in words, for those who do not see it.
        folder: Where the PNG goes; None writes none.
        note: One line under the plot.
        size: Width and height in inches.
    """
    with matplotlib.rc_context(_settings(LIGHT)):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, LIGHT)
        svg = _saved(figure, format="svg", transparent=True, metadata={"Date": None}).decode("utf-8")
        if folder is not None:
            atomic_write_bytes(
                folder / f"{name}.png", _saved(figure, format="png", metadata={"Software": None})
            )
    width, height = (round(inches * PIXELS_PER_INCH) for inches in figure.get_size_inches())
    return Plot(name, title, alt, note, _uri(svg), _uri(darkened(svg)), width, height)


def darkened(svg: str) -> str:
    """A light plot's SVG in dark colours: cheaper than drawing it again, and sure to show the same."""
    colors = dict(zip(_colors(LIGHT), _colors(DARK), strict=True))
    return re.sub("|".join(colors), lambda match: colors[match.group()], svg)


def _colors(theme: Theme) -> list[str]:
    return [theme.ink, theme.muted, theme.grid, theme.paper, theme.before, *theme.series]


def _uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode("ascii")


def _saved(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=PNG_DPI, **options)
    return buffer.getvalue()


def _settings(theme: Theme) -> dict[Any, Any]:
    return {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": theme.ink,
        "text.parse_math": False,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.grid,
        "axes.facecolor": theme.paper,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "figure.facecolor": theme.paper,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.grid,
        "ytick.color": theme.grid,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "lines.linewidth": 1.8,
        "svg.hashsalt": "secura_ds",
    }


def step_axis(axes: Axes) -> None:
    """Label the x axis as optimizer steps, with whole numbers and without vertical grid lines."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(axis="x", visible=False)


def legend_above(figure: Figure, axes: Axes) -> None:
    """A legend above the plot area, where it can hide no data; none for a single entry.

    It takes its room from a figure that grows by as much, so that the plot area keeps its size.
    """
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) < 2:
        return
    labels = [label if len(label) <= LABEL_LENGTH else f"{label[: LABEL_LENGTH - 1]}…" for label in labels]
    longest = max(len(label) for label in labels)
    columns = 3 if longest <= 12 else 2 if longest <= 20 else 1
    rows = -(-len(handles) // columns)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + LEGEND_ROW * (rows - 1))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)

"""One look for all plots: drawn twice, for light and for dark pages, without any global matplotlib state."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secura_ds.files import atomic_write_bytes

MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", (0, (5, 1.6)), (0, (1.4, 1.3)), (0, (6, 1.5, 1.4, 1.5)))
"""Runs differ in marker and dash as well as in colour."""

POINTS_PER_INCH = 72
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
    colormap: str

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
    colormap="viridis",
)
DARK = Theme(
    ink="#e8eaee",
    muted="#a3acb9",
    grid="#343b46",
    paper="#1b2028",
    before="#6b7482",
    series=("#56b4e9", "#ff9a4d", "#3cc9a0", "#e39ad0", "#e8c34a", "#9fd0f2"),
    colormap="viridis",
)

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
    size: tuple[float, float] = (4.8, 2.9),
) -> Plot:
    """Draw a figure for light and dark pages; the light one also goes to `folder`/`name`.png.

    Args:
        draw: Fills an empty figure; called once per theme.
        name: File stem of the PNG.
        title: Heading on the page (the figure itself carries none).
        alt: The plot in words, for those who do not see it.
        folder: Where the PNG goes; None writes none.
        note: One line under the plot.
        size: Width and height in inches.
    """
    uris = [_draw(draw, theme, size) for theme in (LIGHT, DARK)]
    if folder is not None:
        atomic_write_bytes(folder / f"{name}.png", _saved(draw, LIGHT, size, "png"))
    width, height = (round(inches * POINTS_PER_INCH * 4 / 3) for inches in size)
    return Plot(name, title, alt, note, uris[0], uris[1], width, height)


def _draw(draw: Draw, theme: Theme, size: tuple[float, float]) -> str:
    svg = _saved(draw, theme, size, "svg")
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def _saved(draw: Draw, theme: Theme, size: tuple[float, float], kind: str) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(_settings(theme)):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, theme)
        figure.savefig(
            buffer,
            format=kind,
            dpi=PNG_DPI,
            transparent=kind == "svg",
            metadata={"Date": None} if kind == "svg" else {"Software": None},
        )
    return buffer.getvalue()


def _settings(theme: Theme) -> dict[str, object]:
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


def legend_above(figure: Figure, axes: Axes, *, columns: int = 3) -> None:
    """A legend above the plot area, where it can hide no data; none for a single entry."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside upper left", ncols=min(columns, len(handles)))

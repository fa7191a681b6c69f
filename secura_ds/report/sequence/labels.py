"""Names written beside what they name, where there is room: a reader need not look up a colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from secura_ds.report.drawing import LABEL_LENGTH, Theme, legend_above

FONT = 8
END_LENGTH = 14
"""Longer names at the end of a line would take too much of the plot; they go into a legend."""

END_LINES = 6
PLACES = (
    (6, 6, "left", "bottom"),
    (6, -6, "left", "top"),
    (-6, 6, "right", "bottom"),
    (-6, -6, "right", "top"),
    (7, 0, "left", "center"),
    (-7, 0, "right", "center"),
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
)
"""Where a point's name may stand, the most readable place first: offset in points, and alignment."""

Point = tuple[float, float, str, str]
"""x, y, name, colour."""


def short(label: str, length: int = LABEL_LENGTH) -> str:
    """A name cut to fit."""
    return label if len(label) <= length else f"{label[: length - 1]}…"


def label_points(figure: Figure, axes: Axes, points: Sequence[Point], theme: Theme) -> bool:
    """Name points where each name fits without covering another point or name.

    Returns:
        Whether all found room. If not, none is named and the caller draws a legend.
    """
    figure.draw_without_rendering()
    transform, box = axes.transData, axes.get_window_extent()
    spots = [transform.transform((x, y)) for x, y, _, _ in points]
    reach = 4 * figure.dpi / 72
    taken = [Bbox.from_extents(x - reach, y - reach, x + reach, y + reach) for x, y in spots]
    made: list[Annotation] = []
    for number, (x, y, name, _) in enumerate(points):
        for dx, dy, across, along in PLACES:
            text = axes.annotate(
                short(name, 30), (x, y), (dx, dy), textcoords="offset points", ha=across, va=along,
                fontsize=FONT, color=theme.ink, zorder=6,
            )  # fmt: skip
            extent = text.get_window_extent()
            others = taken[:number] + taken[number + 1 :]
            inside = (
                box.x0 <= extent.x0 and extent.x1 <= box.x1 and box.y0 <= extent.y0 and extent.y1 <= box.y1
            )
            if inside and not any(extent.overlaps(other) for other in others):
                made.append(text)
                taken.append(extent)
                break
            text.remove()
        else:
            for text in made:
                text.remove()
            return False
    return True


def label_ends(figure: Figure, axes: Axes, ends: Sequence[Point], theme: Theme) -> None:
    """Name lines at their right ends, pushed apart where they meet; many or long names go into a legend."""
    if len(ends) < 2:
        return
    if len(ends) > END_LINES or max(len(name) for _, _, name, _ in ends) > END_LENGTH:
        legend_above(figure, axes)
        return
    low, high = axes.get_ylim()
    apart = (high - low) * 0.085
    order = sorted(ends, key=lambda end: end[1])
    heights = _spread([y for _, y, _, _ in order], apart, low, high)
    for (x, y, name, color), height in zip(order, heights, strict=True):
        line: dict[str, Any] = {
            "arrowstyle": "-",
            "color": color,
            "linewidth": 0.7,
            "shrinkA": 0,
            "shrinkB": 2,
        }
        axes.annotate(
            name, (x, y), (10, (height - y) / (high - low) * _height_points(figure, axes)), va="center",
            textcoords="offset points", fontsize=FONT, color=theme.ink, annotation_clip=False,
            arrowprops=line,
        )  # fmt: skip


def _height_points(figure: Figure, axes: Axes) -> float:
    figure.draw_without_rendering()
    return float(axes.get_window_extent().height) * 72 / figure.dpi


def _spread(values: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Rising `values` moved as little as a pass up and a pass down need to stand `apart`, within the axis."""
    placed = list(values)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + apart)
    ceiling = high
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - apart
    return placed

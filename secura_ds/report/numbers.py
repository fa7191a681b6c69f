"""How numbers are written, the same in the terminal and on the page."""

from __future__ import annotations

import math

MISSING = "–"


def decimal(value: float, digits: int = 3, *, signed: bool = False) -> str:
    """A number with a true minus sign; `nan` and infinities are spelt out."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite"
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "\u2212")


def compact(value: float) -> str:
    """Three significant digits, whatever the magnitude: 0.0042, 1.23, 4.5e7."""
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e").replace("-", "\u2212")


def count(value: float) -> str:
    """A count with thousands separators: 3,686,400."""
    return f"{round(value):,}"


def share(value: float) -> str:
    """A part of a whole as a percentage: 0.914 is `91.4 %`."""
    return f"{decimal(100 * value, 1)} %"


def memory(num_bytes: float) -> str:
    """Bytes as KiB, MiB or GiB."""
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.0f} KiB"
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.0f} MiB"
    return f"{num_bytes / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds as `42 s`, `3 min 05 s` or `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

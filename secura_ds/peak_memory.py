"""The most main memory this process has held, counted anew where the system allows it."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path


class PeakMemory:
    """Growth of the resident memory's peak since this object was made."""

    def __init__(self) -> None:
        """Begin measuring; resets the kernel's high-water mark where the system allows it."""
        reset_peak()
        self._before = _kibibytes("VmRSS") or _process_peak()

    def growth(self) -> int:
        """Bytes by which the peak rose above the memory held at the beginning."""
        return max(0, peak() - 1024 * self._before)


def reset_peak() -> None:
    """Count the peak from here on; where the system does not let it, it stays that of the whole process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most bytes this process has held since `reset_peak`."""
    return 1024 * (_kibibytes("VmHWM") or _process_peak())


def _kibibytes(field: str) -> int:
    """One field of /proc/self/status; 0 where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def _process_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

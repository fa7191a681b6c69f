"""How much memory a stretch of work needed beyond what the process already held."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path


class PeakMemory:
    """Growth of the resident memory's peak since this object was made."""

    def __init__(self) -> None:
        """Begin measuring; resets the kernel's high-water mark where the system allows it."""
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _kibibytes("VmRSS") or _process_peak()

    def growth(self) -> int:
        """Bytes by which the peak rose above the memory held at the beginning."""
        return 1024 * max(0, (_kibibytes("VmHWM") or _process_peak()) - self._before)


def _kibibytes(field: str) -> int:
    """One field of /proc/self/status; 0 where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def _process_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

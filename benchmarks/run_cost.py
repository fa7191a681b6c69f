"""Wall time and peak memory of a command with all its processes, sampled every two seconds.

Memory is the sum of proportional set sizes (PSS), which counts a page shared by two processes once.

    python benchmarks/run_cost.py --out cost.json -- make quickstart
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from secura_ds.errors import run_command
from secura_ds.files import atomic_write_json

INTERVAL_SECONDS = 2.0


def tree_bytes(process: psutil.Process) -> int:
    """Proportional set size of a process and its descendants, in bytes."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            total += member.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
            continue  # it ended between listing and reading
    return total


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is the command's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    arguments = parser.parse_args(argv)
    command = [word for i, word in enumerate(arguments.command) if i > 0 or word != "--"]
    if not command:
        parser.error("give a command after --")
    start, peak = time.perf_counter(), 0
    running = subprocess.Popen(command)
    while running.poll() is None:
        try:
            peak = max(peak, tree_bytes(psutil.Process(running.pid)))
        except psutil.NoSuchProcess:
            break
        time.sleep(INTERVAL_SECONDS)
    status = running.wait()
    figures = {
        "command": command,
        "exit_status": status,
        "wall_seconds": round(time.perf_counter() - start, 1),
        "peak_memory_gib": round(peak / 2**30, 2),
        "cpu_count": psutil.cpu_count(),
        "load_average": psutil.getloadavg()[1],
    }
    print(f"{figures['wall_seconds']} s, peak memory {figures['peak_memory_gib']} GiB, exit status {status}")
    if arguments.out:
        atomic_write_json(arguments.out, figures)
    return status


if __name__ == "__main__":
    sys.exit(run_command(main))

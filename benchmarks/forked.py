"""Processes forked from one that has imported everything, so that a command starts in a second.

The one that forks must have no pool of threads: `torch.set_num_threads(1)` first.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

HUNG = 1000
"""What `ends` gives in place of a status."""


def fork(action: Callable[[], int], log: Path, environment: dict[str, str]) -> int:
    """Run `action` in a process of its own, which says what it says to `log`; returns its number."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(environment)
        status = action()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def ended(process: int) -> bool:
    """Whether a process has ended; it is not waited for."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def ends(processes: Sequence[int], patience: float = 1200.0) -> list[int]:
    """Wait for processes; their statuses, `HUNG` for one that had to be killed after `patience` seconds."""
    until = time.monotonic() + patience
    while not all(map(ended, processes)) and time.monotonic() < until:
        time.sleep(0.005)
    hung = [process for process in processes if not ended(process)]
    for process in hung:
        os.kill(process, signal.SIGKILL)
    statuses = {process: os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes}
    return [HUNG if process in hung else status for process, status in statuses.items()]


def rank_environments(ranks: int, port: str) -> list[dict[str, str]]:
    """What a launcher would tell each rank; nothing where there is one."""
    if ranks == 1:
        return [{}]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    shared["LOCAL_WORLD_SIZE"] = str(ranks)
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

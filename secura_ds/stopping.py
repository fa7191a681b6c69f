"""Signals that ask a command to end, and the status it then ends with.

Ctrl-C is a user's; SIGTERM and SIGUSR1 are a cluster's, at preemption or ahead of a time limit. Training,
evaluating, merging: each ends with nothing half-written, and the same command goes on (with `--resume`, where
it has one).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import NoReturn

REQUEUE = 75
"""Exit status that asks a cluster to run the command again (EX_TEMPFAIL of sysexits.h)."""
FROM_CLUSTER = (signal.SIGTERM, signal.SIGUSR1)


class Interrupted(KeyboardInterrupt):
    """A cluster's signal, where a command can end at once."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_status(number: int) -> int:
    """What a command that was ended by a signal exits with."""
    return 128 + number if number == signal.SIGINT else REQUEUE


def interruptible() -> AbstractContextManager[None]:
    """Inside the block a cluster's signal raises `Interrupted`, as Ctrl-C raises its own exception."""
    return handled(FROM_CLUSTER, _interrupt)


@contextmanager
def handled(numbers: tuple[int, ...], handler: object) -> Iterator[None]:
    """Inside the block `handler` is called for these signals; outside the main thread nothing changes."""
    try:
        before = {number: signal.signal(number, handler) for number in numbers}  # type: ignore[arg-type]
    except ValueError:  # not the main thread: signals are the caller's business
        yield
        return
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)

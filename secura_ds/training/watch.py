"""When one rank of a run fails or dies, the others say so and end, instead of waiting for it for ever.

Each rank has a thread that tells a store how it is, over a connection of its own, and looks at the others. A
collective that a rank no longer enters hangs under NCCL and fails with some text about connections under
gloo; either way what the user reads is which rank was first, and why.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import psutil
import torch
from torch.distributed import PrefixStore, TCPStore

from secura_ds import environment
from secura_ds.errors import RankError, UserError, first_line
from secura_ds.ranks import distributed
from secura_ds.stopping import Interrupted, exit_status

logger = logging.getLogger(__name__)

PERIOD = 2.0  # seconds between two looks at the others
PATIENCE = 40.0  # seconds without a sign of life after which a rank on another machine counts as dead
STORE_PATIENCE = 15.0  # seconds without the store, which lives in the main rank's process or the launcher's
ARRIVAL = 300.0  # seconds in which all ranks must have begun
HEARING = 10.0  # seconds in which the reason for a failed collective may still arrive

_RUNS = itertools.count()


class Failure(NamedTuple):
    """The first rank that failed or died, what became of it, and what the others exit with."""

    rank: int
    reason: str
    status: int = 2


class Watch(threading.Thread):
    """This rank's sign of life, and its eye on the other ranks."""

    def __init__(self) -> None:
        super().__init__(name="watch", daemon=True)
        self.rank, self.ranks = environment.rank(), environment.world_size()
        address, port = environment.rendezvous()
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        # A process may run one training after another, and each must not hear of the last one's end.
        self._store = PrefixStore(f"secura_ds/watch/{next(_RUNS)}", store)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._beats = 0
        self._store_is_gone = False
        self._first: Failure | None = None
        self._told: dict[int, tuple[dict[str, Any], float]] = {}
        self._store_answered = time.monotonic()
        self._say(state="runs")
        # All ranks come here together; from now on each can tell at once when another process is gone.
        others = [str(rank) for rank in range(self.ranks) if rank != self.rank]
        self._store.wait(others, timedelta(seconds=ARRIVAL))
        self._listen()

    def run(self) -> None:
        """Look at the others until this rank ends; if one of them has failed, end this process."""
        while not self._ended.wait(PERIOD):
            first = self.failed_elsewhere()
            if first is None:
                continue
            # The main thread may be about to say the same; inside a hanging collective it never will.
            if self._ended.wait(HEARING / 2):
                return
            if self.speaks(first.rank):
                print(f"\nerror: {first.reason}", file=sys.stderr, flush=True)  # below the progress line
            os._exit(first.status)

    def failed_elsewhere(self) -> Failure | None:
        """The first other rank that failed or died, and what became of it; None while all are well."""
        with self._lock:
            if self._first is not None:
                return self._first
            try:
                if self._store_is_gone:
                    raise ConnectionError  # to try again would only make torch print its stack
                self._beats += 1
                self._say(state="runs")
                if self._store.check(["first"]):
                    failure = Failure(**json.loads(self._store.get("first")))
                    if failure.rank != self.rank:
                        self._first = failure
                    return self._first
                self._listen()
                self._store_answered = time.monotonic()
            except Exception:  # torch raises several kinds when the store is gone
                self._store_is_gone = True
                if time.monotonic() - self._store_answered > STORE_PATIENCE:
                    reason = "rank 0 no longer answers: see its last lines above, or those of the launcher"
                    return Failure(0, reason)
        return next((dead for rank in self._told if (dead := self._death_of(rank)) is not None), None)

    def wait_for_reason(self) -> Failure | None:
        """As `failed_elsewhere`, for a rank whose collective has just failed: it may be known soon."""
        until = time.monotonic() + HEARING
        while True:
            first = self.failed_elsewhere()
            if first is not None or time.monotonic() > until:
                return first
            time.sleep(0.2)

    def speaks(self, failed: int) -> bool:
        """True on the one rank that tells the user that rank `failed` is gone."""
        return self.rank == min({0, 1} - {failed})

    def report(self, reason: str, status: int = 2) -> None:
        """Tell the others that this rank fails, and what to exit with; the first report counts."""
        with self._lock, suppress(Exception):
            failure = Failure(self.rank, reason, status)
            self._store.compare_set("first", "", json.dumps(failure._asdict()))

    def end(self) -> None:
        """This rank has nothing left to do with the others."""
        self._ended.set()
        with self._lock, suppress(Exception):
            self._say(state="ended")

    def _say(self, state: str) -> None:
        here = {"pid": os.getpid(), "host": socket.gethostname(), "processes": _process_table()}
        self._store.set(str(self.rank), json.dumps({**here, "beats": self._beats, "state": state}))

    def _listen(self) -> None:
        """Note what every other rank says of itself, and when it said something new."""
        for rank in range(self.ranks):
            if rank != self.rank and self._store.check([str(rank)]):
                told = json.loads(self._store.get(str(rank)))
                if told != self._told.get(rank, (None,))[0]:
                    self._told[rank] = told, time.monotonic()

    def _death_of(self, rank: int) -> Failure | None:
        told, since = self._told[rank]
        if told["state"] == "ended":
            return None
        place = f"rank {rank} (process {told['pid']} on {told['host']})"
        if told["processes"] == _process_table() and not _lives(told["pid"]):
            how = "was ended from outside, as the system does when memory runs out"
        elif time.monotonic() - since > PATIENCE:
            how = f"has not answered for {PATIENCE:.0f} s: look at that machine"
        else:
            return None
        return Failure(rank, f"{place} {how}; --resume goes on from the last checkpoint")


@contextmanager
def watching() -> Iterator[None]:
    """Inside the block a rank that fails or dies ends the others, with its reason; nothing in one process.

    Raises:
        RankError: on a rank whose collective failed because another rank had failed or died.
    """
    if not distributed() or environment.world_size() == 1:
        yield
        return
    watch = Watch()
    watch.start()
    try:
        yield
    except Interrupted as interrupt:
        reason = f"rank {watch.rank} was ended by {interrupt} before training began"
        watch.report(reason, exit_status(interrupt.number))
        raise
    except Exception as error:
        first = watch.wait_for_reason() if _of_a_collective(error) else None
        if first is not None:
            raise RankError(first.reason, loud=watch.speaks(first.rank), status=first.status) from error
        if isinstance(error, UserError):
            watch.report(str(error))
        else:
            reason = f"rank {watch.rank} failed: {type(error).__name__}: {first_line(error)}"
            watch.report(reason)
            logger.error("error: %s", reason)
            time.sleep(1.5 * PERIOD)  # the store may live in this process: the others must hear it first
        raise
    finally:
        watch.end()


def _of_a_collective(error: Exception) -> bool:
    """True for what torch raises when another rank is gone."""
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in words)


def _process_table() -> str:
    """The same on all processes that can see each other's process numbers."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

"""The ranks of a launched run meet, and show that they reach each other, before anything large is loaded.

Each rank says at the store where it is, and then all add up one number on the devices they will train on. A
node that does not answer is named after half a minute, instead of a run that hangs for half an hour.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from secura_ds import environment
from secura_ds.errors import RankError, UserError, first_line

PATIENCE = 30.0  # seconds without an answer; while ranks arrive, since the last of them did
GRACE = 2.0  # seconds in which every rank that is alive notices that time is up
GROUP_TIMEOUT = timedelta(minutes=30)


def connect() -> None:
    """Start the process group of a launched run; ranks of an earlier run in this process have met already.

    Raises:
        UserError: the port is taken, or a node did not answer; names it, where its name is known.
    """
    if dist.is_initialized():
        return
    store = _keys_of_meeting(_open_store())
    _arrive(store)
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(environment.local_rank())
    deadline = _Deadline()
    deadline.start()
    try:
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=PrefixStore("group", store),
            rank=environment.rank(),
            world_size=environment.world_size(),
            timeout=GROUP_TIMEOUT,
        )
        count = torch.ones(1, device="cuda" if gpu else "cpu")
        dist.all_reduce(count)
        assert int(count) == environment.world_size(), (
            "a sum over the ranks has another value than their number"
        )
        store.set(f"reduced/{environment.rank()}", "")
    except RuntimeError as error:  # torch's own, of the store or of the group
        raise UserError(
            f"the ranks arrived, but could not be connected ({first_line(error)}): see the logs of the others"
        ) from error
    finally:
        deadline.over.set()


def _open_store() -> TCPStore:
    """The store at which the ranks meet; rank 0 serves it, unless the launcher does."""
    address, port = environment.rendezvous()
    served_here = environment.rank() == 0 and not environment.launcher_serves_store()
    if not served_here:
        _wait_for(address, port)
    try:
        return TCPStore(
            address, port, is_master=served_here, timeout=timedelta(seconds=PATIENCE), wait_for_workers=False
        )
    except dist.DistError as error:
        if not served_here:
            raise
        raise UserError(
            f"port {port}, at which the ranks should meet, is taken on {socket.gethostname()}, perhaps by "
            "another run: choose another (deepspeed --master_port, MASTER_PORT)"
        ) from error


def _keys_of_meeting(store: TCPStore) -> PrefixStore:
    return PrefixStore(f"secura_ds/meeting/{environment.launcher_attempt()}", store)


def _wait_for(address: str, port: int) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"{_described({0})[0]} did not answer at {address}:{port} within {PATIENCE:.0f} s "
                    f"({error}): see its log, and whether {socket.gethostname()} reaches that address"
                ) from error
        time.sleep(0.2)


def _arrive(store: Store) -> None:
    """Say where this rank is, and wait until all have."""
    store.set(f"arrived/{environment.rank()}", socket.gethostname())
    missing, until = set(range(environment.world_size())), time.monotonic() + PATIENCE
    while missing:
        arrived = {rank for rank in missing if store.check([f"arrived/{rank}"])}
        missing -= arrived
        if arrived:
            until = time.monotonic() + PATIENCE
        elif time.monotonic() > until:
            first = min(set(range(environment.world_size())) - missing)
            raise RankError(_no_answer(missing), loud=environment.rank() == first)
        else:
            time.sleep(0.05)


class _Deadline(threading.Thread):
    """Ends this process if the sum over the ranks does not: a collective that hangs cannot be left."""

    def __init__(self) -> None:
        super().__init__(name="meeting", daemon=True)
        self.over = threading.Event()
        address, port = environment.rendezvous()
        # A connection of its own: the other one may be waiting for an answer.
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=PATIENCE))
        self._store = _keys_of_meeting(store)

    def run(self) -> None:
        if self.over.wait(PATIENCE):
            return
        ranks = set(range(environment.world_size()))
        try:
            self._store.set(f"waited/{environment.rank()}", "")
            time.sleep(GRACE)
            signs = ("waited", "reduced")
            silent = {r for r in ranks if not any(self._store.check([f"{sign}/{r}"]) for sign in signs)}
        except Exception:  # torch raises several kinds when the store is gone
            silent = {0}
        if environment.rank() == min(ranks - silent):
            print(f"error: {_no_answer(silent) if silent else _no_sum()}", file=sys.stderr, flush=True)
        os._exit(2)


def _no_answer(missing: Iterable[int]) -> str:
    nodes = ", ".join(_described(missing))
    address, port = environment.rendezvous()
    return (
        f"{nodes} did not answer within {PATIENCE:.0f} s: see the log there, and whether it reaches "
        f"{address}:{port}"
    )


def _no_sum() -> str:
    names = "NCCL_SOCKET_IFNAME" if torch.cuda.is_available() else "GLOO_SOCKET_IFNAME"
    return (
        f"all {environment.world_size()} ranks arrived, but a sum over them took more than {PATIENCE:.0f} s: "
        f"their machines do not reach each other on the interface that was chosen; set {names}"
    )


def _described(ranks: Iterable[int]) -> list[str]:
    """The nodes of some ranks, each with its ranks."""
    local, by_node = environment.local_world_size(), dict[int, list[int]]()
    for rank in sorted(ranks):
        by_node.setdefault(rank // local, []).append(rank)
    names = environment.node_names()
    return [
        f"{names[node] if node < len(names) else f'node {node}'} (rank{'s' * (len(own) > 1)} "
        f"{', '.join(map(str, own))})"
        for node, own in by_node.items()
    ]

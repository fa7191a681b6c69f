"""What all ranks of a run must do together; each does nothing special in a single process."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch

from secura_ds.environment import is_main_process
from secura_ds.errors import UserError
from secura_ds.stopping import FROM_CLUSTER

T = TypeVar("T")


def distributed() -> bool:
    """True where several ranks share the run."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def end_process(status: int) -> NoReturn:
    """Part from the other ranks, and end this process with `status`.

    The threads of a process group end only when it is freed, and DeepSpeed keeps groups, model and engine for
    ever. An interpreter that ends with such threads is aborted now and then ("terminate called without an
    active exception"), after all was done: so this one does not wait for its own end.
    """
    if not distributed():
        sys.exit(status)
    for number in FROM_CLUSTER:  # a launcher passes on what this process has heard already
        signal.signal(number, signal.SIG_IGN)
    torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on the main process only and hand its result, or its UserError, to every rank.

    Without this a rank that fails alone would leave the others waiting in their next collective for ever.

    Raises:
        UserError: `action` raised one; on every rank, with the same message.
    """
    outcome: list[Any] = [None, None]
    failure: BaseException | None = None
    if is_main_process():
        try:
            outcome[0] = action()
        except Exception as error:
            failure, outcome[1] = error, str(error)
    if distributed():
        torch.distributed.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def total(values: list[float], device: torch.device | str) -> list[float]:
    """The sum over all ranks of each number."""
    if not distributed():
        return values
    summed = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(summed)
    return summed.tolist()


def from_all(value: Any) -> list[Any]:
    """Each rank's picklable `value`, in the order of ranks, on every rank."""
    if not distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values

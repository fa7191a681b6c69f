"""Several processes share one merge: each takes the next part of a shard, until none is left.

Workers only write parts. The process that started them begins and ends shards, notes the finished ones, tells
how far all of them are, and ends them together when one fails or dies, or when it is interrupted itself. A
pool of `multiprocessing` would wait for ever for a worker that died; one of `concurrent.futures` cannot be
cut short.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import torch

from secura_ds.errors import UserError
from secura_ds.files import explained
from secura_ds.merge.edits import Edit
from secura_ds.merge.work import Advance, Part, WorkFolder, begin_shard, end_shard, reader, write_part
from secura_ds.peak_memory import PeakMemory
from secura_ds.stopping import FROM_CLUSTER

_SIGNALS = {signal.SIGINT, *FROM_CLUSTER}


def share(
    work: WorkFolder, parts: Sequence[Part], edits: Mapping[str, Edit], workers: int, advance: Advance
) -> list[int]:
    """Write `parts`, all those of some shards, in `workers` processes.

    Returns:
        How far the memory of each process grew, in bytes.

    Raises:
        UserError: a worker refused its part, met a full disk, or died. No process is left behind.
    """
    assert 0 < workers <= len(parts), (workers, len(parts))
    left = deque(parts)
    missing = Counter(part.file.path.name for part in parts)
    for file in {part.file.path.name: part.file for part in parts}.values():
        begin_shard(work.path, file)
        advance(len(file.header))
    with _crew(workers, work.path, edits) as crew:
        busy = {worker.pipe: worker for worker in crew}
        for worker in crew:
            worker.begin(left.popleft())
        while busy:
            for pipe in cast(list[Connection], wait(list(busy))):
                worker = busy[pipe]
                kind, value = worker.hear()
                if kind == "wrote":
                    advance(value)
                    continue
                worker.growth, file = value, worker.part.file
                # The worker goes on while this process waits for the disk.
                if left:
                    worker.begin(left.popleft())
                else:
                    del busy[pipe]
                missing[file.path.name] -= 1
                if not missing[file.path.name]:
                    end_shard(work.path, file)
                    work.note(file.path.name)
        return [worker.growth for worker in crew]


@dataclass
class _Worker:
    """A worker as the process that started it sees it."""

    process: BaseProcess
    pipe: Connection
    growth: int = 0
    part: Part = field(init=False)

    def begin(self, part: Part) -> None:
        """Give it a part to write."""
        self.part = part
        self.tell(part)

    def tell(self, message: Part | Mapping[str, Edit]) -> None:
        """Send it a part to write, or before the first one the edits."""
        try:
            self.pipe.send(message)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._died() from error

    def hear(self) -> tuple[str, Any]:
        """Its next message: ("wrote", bytes) or ("finished", growth of memory in bytes)."""
        try:
            kind, value = self.pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._died() from error
        if kind == "refused":
            raise UserError(value)
        if kind == "failed":
            raise RuntimeError(f"a worker of the merge failed:\n{value}")
        return kind, value

    def _died(self) -> UserError:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return UserError(
            f"a worker of the merge {how}, as happens when memory runs out: "
            "run the same command again, it goes on from the finished shards; fewer workers need less memory"
        )


@contextmanager
def _crew(workers: int, folder: Path, edits: Mapping[str, Edit]) -> Iterator[list[_Worker]]:
    """Started workers that have the edits; none of them is alive after the block."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    crew: list[_Worker] = []
    try:
        with _signals_for_us_alone():
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, folder, threads), daemon=True)
                process.start()
                theirs.close()
                crew.append(_Worker(process, ours))
        # Only now, as what a pipe cannot hold waits until the worker has imported all that it needs.
        for worker in crew:
            worker.tell(edits)
        yield crew
    finally:
        for worker in crew:
            worker.process.kill()
        for worker in crew:
            worker.process.join()
            worker.pipe.close()


@contextmanager
def _signals_for_us_alone() -> Iterator[None]:
    """Processes started in the block never see signals that ask for an end, which reach whole process groups.

    Blocked signals stay blocked in a child, from its first instruction on; ours arrive after the block.
    """
    resource_tracker.ensure_running()  # its start would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, folder: Path, threads: int) -> None:
    """A worker: takes the edits, then writes parts until the other side of the pipe is gone."""
    torch.set_num_threads(threads)
    memory, read = PeakMemory(), reader()
    try:
        edits: Mapping[str, Edit] = pipe.recv()
        while True:
            part: Part = pipe.recv()
            with explained(folder):
                write_part(folder, part, edits, read, lambda count: pipe.send(("wrote", count)))
            pipe.send(("finished", memory.growth()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except UserError as error:
        pipe.send(("refused", str(error)))
    except Exception:
        pipe.send(("failed", traceback.format_exc()))

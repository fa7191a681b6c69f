"""Several processes share one merge: each takes the largest shard that is left, until none is.

Workers only write shards. The process that started them keeps the note of finished shards, tells how far all
of them are, and ends them together when one fails or dies, or when it is interrupted itself. A pool of
`multiprocessing` would wait for ever for a worker that died, one of `concurrent.futures` cannot be cut short.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import torch

from secura_ds.checkpoint_files import TensorFile
from secura_ds.errors import UserError
from secura_ds.files import explained
from secura_ds.merge.edits import Edit
from secura_ds.merge.memory import PeakMemory
from secura_ds.merge.work import Advance, WorkFolder, write_shard

_SIGNALS = {signal.SIGINT, signal.SIGTERM}


def share_shards(
    work: WorkFolder, files: Sequence[TensorFile], edits: Mapping[str, Edit], workers: int, advance: Advance
) -> list[int]:
    """Write the shards of `files` in `workers` processes; how far the memory of each grew, in bytes.

    Raises:
        UserError: a worker refused its shard, met a full disk, or died. No process is left behind.
    """
    left = sorted(files, key=lambda file: file.size)
    assert 0 < workers <= len(left), (workers, len(left))
    with _crew(workers, work.path, edits) as crew:
        busy = {worker.pipe: worker for worker in crew}
        for worker in crew:
            worker.tell(left.pop())
        while busy:
            for pipe in cast(list[Connection], wait(list(busy))):
                worker = busy[pipe]
                kind, value = worker.hear()
                if kind == "wrote":
                    advance(value)
                    continue
                name, worker.growth = value
                work.note(name)
                if left:
                    worker.tell(left.pop())
                else:
                    del busy[pipe]
        return [worker.growth for worker in crew]


@dataclass
class _Worker:
    """A worker as the process that started it sees it."""

    process: BaseProcess
    pipe: Connection
    growth: int = 0

    def tell(self, file: TensorFile) -> None:
        """Give it a shard to write."""
        try:
            self.pipe.send(file)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._died() from error

    def hear(self) -> tuple[str, Any]:
        """Its next message: ("wrote", bytes) or ("finished", (shard, growth of memory in bytes))."""
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
    """Started workers; none of them is alive after the block."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    crew: list[_Worker] = []
    try:
        with _signals_for_us_alone():
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, folder, edits, threads), daemon=True)
                process.start()
                theirs.close()
                crew.append(_Worker(process, ours))
        yield crew
    finally:
        for worker in crew:
            worker.process.kill()
        for worker in crew:
            worker.process.join()
            worker.pipe.close()


@contextmanager
def _signals_for_us_alone() -> Iterator[None]:
    """Processes started in the block never see Ctrl-C and SIGTERM, which reach whole process groups.

    Blocked signals stay blocked in a child, from its first instruction on; ours arrive after the block.
    """
    resource_tracker.ensure_running()  # its start would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, folder: Path, edits: Mapping[str, Edit], threads: int) -> None:
    """A worker: writes the shards that it is given until the other side of the pipe is gone."""
    torch.set_num_threads(threads)
    memory = PeakMemory()
    try:
        while True:
            file: TensorFile = pipe.recv()
            with explained(folder):
                write_shard(folder, file, edits, lambda count: pipe.send(("wrote", count)))
            pipe.send(("finished", (file.path.name, memory.growth())))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except UserError as error:
        pipe.send(("refused", str(error)))
    except Exception:
        pipe.send(("failed", traceback.format_exc()))

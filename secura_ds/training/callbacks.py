"""What happens at the end of a step: counting, stopping, folding, statistics, log and progress line."""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secura_ds.adapter import fold, layer_statistics
from secura_ds.environment import is_main_process
from secura_ds.files import atomic_write_text
from secura_ds.peak_memory import peak, reset_peak
from secura_ds.ranks import total
from secura_ds.stopping import FROM_CLUSTER, handled
from secura_ds.training.trainer import Trainer

logger = logging.getLogger(__name__)

PATIENCE = 3  # steps in a row whose loss may be not finite
STATISTICS_LINES = 20  # of layer statistics, in a run


class StopRequested(Exception):
    """A signal asked for the end of an evaluation or an export; raised on all ranks at the same point."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


class Signals:
    """Remembers signals that ask for an end, so that training ends after the step with a checkpoint."""

    KINDS = (signal.SIGINT, *FROM_CLUSTER)

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal: the first one is remembered, a second Ctrl-C ends the process at once."""
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        # A launcher follows Ctrl-C with SIGTERM: what came first stays.
        if self.received is None:
            self.received = number
            logger.warning("%s: stopping after this step, with a checkpoint", signal.Signals(number).name)

    def watched(self) -> AbstractContextManager[None]:
        """Inside the block signals are remembered instead of ending the process."""
        return handled(self.KINDS, self)

    def agreed(self, device: torch.device, more: Sequence[float] = ()) -> tuple[int | None, list[float]]:
        """The signal that all ranks end on, if any of them was sent one, and sums of `more`; collective."""
        own = [float(self.received == number) for number in self.KINDS]
        sums = total([*own, *more], device)
        sent = [number for number, count in zip(self.KINDS, sums, strict=False) if count]
        return next(iter(sent), None), sums[len(own) :]

    def stop_if_asked(self, device: torch.device) -> None:
        """Raise `StopRequested` on all ranks if one of them was sent a signal; collective."""
        sent, _ = self.agreed(device)
        if sent is not None:
            raise StopRequested(sent)


@contextmanager
def asking(
    model: nn.Module, stop_if_asked: Callable[[torch.device], None], device: torch.device
) -> Iterator[None]:
    """Inside the block every forward of `model` begins with `stop_if_asked`, on all ranks."""
    handle = model.register_forward_pre_hook(lambda *_: stop_if_asked(device))
    try:
        yield
    finally:
        handle.remove()


class Agreement(TrainerCallback):
    """Once a step all ranks add up their tokens, losses that are not finite, and signals that ask to stop."""

    def __init__(self, trainer: Trainer, signals: Signals) -> None:
        self.trainer, self.signals = trainer, signals
        self.stopped_by: int | None = None
        self.not_finite = 0
        self._step_began = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Take over the counters of the run that is continued."""
        self.trainer.restore_counters()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Give the sampler its epoch; the Trainer loses sight of it when it skips batches after a resume."""
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Take the time of steps alone: validations and checkpoints say nothing about training's speed."""
        self._step_began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Sum up over the ranks, and stop all of them together."""
        trainer = self.trainer
        own = [trainer.step_tokens, float(not math.isfinite(trainer.step_loss))]
        sent, (tokens, broken) = self.signals.agreed(args.device, own)
        trainer.step_loss, trainer.step_tokens = 0.0, 0
        trainer.total_tokens += tokens
        trainer.total_seconds += time.perf_counter() - self._step_began
        self.not_finite = self.not_finite + 1 if broken else 0
        if self.not_finite >= PATIENCE:
            control.should_training_stop = True
        elif sent is not None:
            self.stopped_by = sent
            control.should_training_stop = control.should_save = True
        if self.not_finite:
            control.should_save = False

    def on_prediction_step(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Stop in the middle of an evaluation, too: it may take longer than a cluster waits."""
        self.stop_if_asked(args.device)

    def stop_if_asked(self, device: torch.device) -> None:
        """As that of `Signals`; also remembers the signal."""
        try:
            self.signals.stop_if_asked(device)
        except StopRequested as request:
            self.stopped_by = request.signal
            raise


class Folding(TrainerCallback):
    """Writes layer statistics now and then, and folds A B every `fold_every` steps."""

    def __init__(self, folder: Path, fold_every: int) -> None:
        self.folder, self.fold_every = folder, fold_every

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Statistics first: after an M1 fold there is no update left to measure."""
        step = state.global_step
        if step % max(1, state.max_steps // STATISTICS_LINES) == 0 or step == state.max_steps:
            layers = layer_statistics(model)
            if is_main_process():
                append_line(self.folder / "statistics.jsonl", {"step": step, "layers": layers})
        if self.fold_every and step % self.fold_every == 0:
            fold(model)


class Log(TrainerCallback):
    """The progress line and `metrics.jsonl`, on the main process."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.path = trainer, folder / "metrics.jsonl"
        self.bar: tqdm | None = None
        self._tokens, self._seconds = 0.0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open the progress line."""
        self._tokens, self._seconds = self.trainer.total_tokens, self.trainer.total_seconds
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            # Into a file every refresh is a line of its own.
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move the progress line."""
        if self.bar is not None:
            self.bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write one line of metrics."""
        if logs is None or not ("loss" in logs or "eval_loss" in logs):
            return
        if "eval_loss" in logs:
            append_line(self.path, {"step": state.global_step, "eval_loss": logs["eval_loss"]})
            return
        trainer, memory = self.trainer, memory_in_use()
        speed = (trainer.total_tokens - self._tokens) / max(trainer.total_seconds - self._seconds, 1e-9)
        self._tokens, self._seconds = trainer.total_tokens, trainer.total_seconds
        line = {
            "step": state.global_step,
            "epoch": state.epoch,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": speed,
            "memory_bytes": memory,
            "seconds": trainer.total_seconds,
        }
        append_line(self.path, line)
        if self.bar is not None:
            numbers = f"loss {logs['loss']:.4f}, {speed:.0f} tokens/s, {memory / 1e9:.1f} GB"
            self.bar.set_postfix_str(numbers, refresh=sys.stderr.isatty())

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the progress line."""
        self.close()

    def close(self) -> None:
        """Leave the progress line as it is."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Add one JSON object to a log; a number that is not finite becomes null, as JSON has none."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")


def cut_log(path: Path, step: int) -> None:
    """Drop the lines after `step`, and torn ones: the run that is continued writes them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    atomic_write_text(path, "".join(kept))


def memory_in_use() -> int:
    """Bytes this process holds: of the GPU where there is one, else of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.memory_reserved()
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """The most bytes this process has held since `reset_peak_memory`, as `memory_in_use` counts them."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return peak()


def reset_peak_memory() -> None:
    """Count the peak from here on; where the system does not let it, it stays that of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    reset_peak()

"""What a strategy of continual learning may add to training; by itself it adds nothing.

`secura_ds.continual` holds the strategies. They share one training loop: examples of earlier tasks in every
step, a term of the loss or of the gradients, and state of their own in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from secura_ds.training.trainer import Trainer


@dataclass(frozen=True)
class Replay:
    """Rows of earlier tasks, of which every optimizer step takes `per_step`, over all ranks."""

    rows: Dataset
    per_step: int


class Strategy:
    """Sequential fine-tuning: nothing is added. Every method is called on all ranks at the same point."""

    replay: Replay | None = None

    def begin(self, trainer: Trainer) -> None:
        """The trained parameters are in place, those of an earlier run or a resumed checkpoint, too."""

    def before_step(self) -> None:
        """An optimizer step is about to begin."""

    def loss(
        self, trainer: Trainer, model: nn.Module, inputs: dict[str, Any], compute: Callable[[], Tensor]
    ) -> Tensor:
        """The loss of one forward pass.

        Args:
            inputs: the batch; `replayed` (rows,) bool where there is replay.
            compute: the loss without the strategy.
        """
        return compute()

    def after_step(self) -> None:
        """The optimizer has stepped."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, whole tensors by name; collective."""
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave; called before `begin`."""

    def finish(self, trainer: Trainer) -> None:
        """The last checkpoint is written, the adapter is not yet: the model may become what is kept."""


class Steps(TrainerCallback):
    """Tells a strategy of the beginning and the end of every optimizer step."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Pass it on."""
        self.strategy.before_step()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Pass it on."""
        self.strategy.after_step()

"""I-LoRA: a working memory that learns, and a long-term memory that follows it slowly and is what is kept.

Ren et al., "Analyzing and Reducing Catastrophic Forgetting in Parameter Efficient Tuning", arXiv 2402.18865.
The long-term memory is the moving average of the trained parameters, theta_l <- decay theta_l + (1 - decay)
theta_w after every step. Steps learn from the task and from replayed examples, whose last hidden states must
stay near those under the long-term memory: loss + weight * mean |h_w - h_l|^2. Answers are the long-term
memory's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from secura_ds import sharding
from secura_ds.backbones.adapter import backbone_of
from secura_ds.training.model import trainable
from secura_ds.training.sampling import REPLAYED
from secura_ds.training.strategy import Replay, Strategy

if TYPE_CHECKING:
    from secura_ds.training.trainer import Trainer


class InterpolatedLora(Strategy):
    """I-LoRA over the parameters that are trained, of whatever adapter.

    Args:
        replay: examples of earlier tasks; None for the first, which has no consistency loss either.
        decay: share of the long-term memory that a step leaves.
        weight: of the consistency loss.
        memory: the long-term memory after the task before, whole, by parameter name.
    """

    def __init__(
        self,
        replay: Replay | None,
        *,
        decay: float,
        weight: float,
        memory: dict[str, Tensor] | None = None,
    ) -> None:
        self.replay, self.decay, self.weight = replay, decay, weight
        self._start = memory
        self._parameters: dict[str, Parameter] = {}
        self._memory: dict[str, Tensor] = {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The long-term memory of a checkpoint."""
        self._start = tensors

    def begin(self, trainer: Trainer) -> None:
        """Start with the memory given, else with the parameters as they are."""
        self._parameters = trainable(trainer.model)
        for name, parameter in self._parameters.items():
            if self._start is not None:
                self._memory[name] = sharding.part_of_whole(parameter, self._start[name].float())
            else:
                self._memory[name] = sharding.local_part(parameter).float().clone()
        self._start = None

    def after_step(self) -> None:
        """Move the long-term memory towards the working memory; each rank its part."""
        for name, parameter in self._parameters.items():
            self._memory[name].lerp_(sharding.local_part(parameter).float(), 1 - self.decay)

    def state(self) -> dict[str, Tensor]:
        """The long-term memory."""
        return {n: sharding.whole_of_part(p, self._memory[n]) for n, p in self._parameters.items()}

    def loss(
        self, trainer: Trainer, model: nn.Module, inputs: dict[str, Any], compute: Callable[[], Tensor]
    ) -> Tensor:
        """The loss of the examples, and how far replayed ones are from the long-term memory's."""
        if self.replay is None:
            return compute()
        # Every rank takes both forwards, as ZeRO-3 needs it; one without replayed rows counts nothing.
        chosen = inputs[REPLAYED]
        with _hidden_states(trainer) as seen:
            with self._in_place(), torch.no_grad():
                rows = chosen if bool(chosen.any()) else slice(0, 1)
                ids, mask = inputs["input_ids"][rows], inputs["attention_mask"][rows]
                model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
            loss = compute()
        remembered, working = seen
        counted = inputs["attention_mask"][chosen]
        distance = consistency(working[chosen], remembered[: len(counted)], counted)
        # A mean over the step's replayed examples: passes add up, ranks average.
        share = trainer.accelerator.num_processes / self.replay.per_step
        return loss + self.weight * share * distance

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Inside the block the parameters are the long-term memory's."""
        parameters = list(self._parameters.values())
        working = [sharding.local_part(parameter).clone() for parameter in parameters]
        sharding.put_local_parts(parameters, list(self._memory.values()))
        try:
            yield
        finally:
            sharding.put_local_parts(parameters, working)

    def finish(self, trainer: Trainer) -> None:
        """What is written and measured is the long-term memory."""
        parameters = list(self._parameters.values())
        sharding.put_local_parts(parameters, list(self._memory.values()))


def consistency(working: Tensor, remembered: Tensor, mask: Tensor) -> Tensor:
    """The sum over examples of the mean squared distance of their tokens' last hidden states.

    Args:
        working, remembered: (examples, tokens, width).
        mask: (examples, tokens), 1 for tokens that are no padding.
    """
    squares = (working.float() - remembered.float()).square().mean(-1) * mask
    return (squares.sum(1) / mask.sum(1)).sum()


@contextmanager
def _hidden_states(trainer: Trainer) -> Iterator[list[Tensor]]:
    """Inside the block every forward adds the last hidden states (rows, tokens, width) to the list."""
    seen: list[Tensor] = []
    body = backbone_of(trainer.model).base_model
    handle = body.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
    try:
        yield seen
    finally:
        handle.remove()

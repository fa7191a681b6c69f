"""Elastic weight consolidation: a quadratic penalty on moving parameters that mattered for earlier tasks.

Kirkpatrick et al., arXiv 1612.00796: lambda / 2 * sum_k sum_i F_ki (theta_i - theta_ki)^2 over earlier tasks
k, F the diagonal of the Fisher information at the end of task k. Online (Schwarz et al., arXiv 1805.06370):
lambda / 2 * sum_i gamma F_i (theta_i - theta_i')^2 with F <- gamma F + F_k, theta' the end of the last task.

Both are known from two numbers a parameter, the sum of the weights F and that of F theta: the gradient of the
penalty is lambda (sum F * theta - sum F theta_k). F is the empirical one: the mean over examples of the
squared gradient of log p(answer | prompt), at the answers of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from tqdm import tqdm

from secura_ds import sharding
from secura_ds.backbones.head import IGNORED
from secura_ds.environment import is_main_process, rank, world_size
from secura_ds.errors import UserError
from secura_ds.training.model import trainable
from secura_ds.training.strategy import Strategy

if TYPE_CHECKING:
    from secura_ds.training.trainer import Trainer


@dataclass
class Anchors:
    """What earlier tasks left: by parameter name, whole and in fp32, the weights F and their sums F theta."""

    weights: dict[str, Tensor]
    pulls: dict[str, Tensor]

    def to_tensors(self) -> dict[str, Tensor]:
        """One flat mapping, for a file."""
        return {f"weights/{n}": t for n, t in self.weights.items()} | {
            f"pulls/{n}": t for n, t in self.pulls.items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Anchors:
        """The inverse of `to_tensors`."""
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "pulls": {}}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            parts[kind][name] = value
        return cls(parts["weights"], parts["pulls"])


def joined(
    before: Anchors | None, fisher: Mapping[str, Tensor], values: Mapping[str, Tensor], decay: float | None
) -> Anchors:
    """The anchors after one more task.

    Args:
        before: those of the tasks before it.
        fisher: its Fisher information, by parameter name.
        values: the parameters at its end.
        decay: gamma of the online variant; None keeps an anchor a task.
    """
    earlier = before or Anchors({}, {})
    weights, pulls = {}, {}
    for name, found in fisher.items():
        old = earlier.weights.get(name, torch.zeros_like(found))
        if decay is None:
            weights[name] = old + found
            pulls[name] = earlier.pulls.get(name, torch.zeros_like(found)) + found * values[name]
        else:
            weights[name] = decay * old + found
            pulls[name] = weights[name] * values[name]
    return Anchors(weights, pulls)


class ElasticWeights(Strategy):
    """The penalty of `anchors`, added to the gradients of every step.

    Args:
        penalty: lambda.
        anchors: what earlier tasks left; None for the first.
        decay: gamma of the online variant.
    """

    def __init__(self, penalty: float, anchors: Anchors | None, decay: float | None = None) -> None:
        self.penalty, self.anchors, self.decay = penalty, anchors, decay
        self._weights: dict[str, Tensor] = {}
        self._pulls: dict[str, Tensor] = {}
        self._parameters: dict[str, Parameter] = {}
        self._gradients: dict[str, Tensor] = {}

    def begin(self, trainer: Trainer) -> None:
        """Have the backward pass add the penalty's gradient.

        Raises:
            UserError: the anchors belong to another adapter, or losses are scaled (float16).
        """
        if self.anchors is None:
            return
        if trainer.args.fp16:
            raise UserError('strategy "ewc" does not know how float16 losses are scaled: use "bfloat16"')
        self._parameters = trainable(trainer.model)
        lacking = [name for name in self._parameters if name not in self.anchors.weights]
        if lacking:
            raise UserError(f"the anchors of earlier tasks lack {lacking[0]}: they are another adapter's")
        # gamma weighs what is left of all earlier tasks; a task's own end has weight 1 (arXiv 1805.06370).
        scale = self.penalty * (self.decay or 1.0)
        passes = trainer.args.gradient_accumulation_steps
        for name, parameter in self._parameters.items():
            device = parameter.device
            self._weights[name] = scale * self.anchors.weights[name].to(device)
            self._pulls[name] = scale * self.anchors.pulls[name].to(device)
            # Ranks average their gradients and passes add theirs up.
            parameter.register_hook(lambda grad, name=name: self._with_penalty(grad, name, passes))

    def before_step(self) -> None:
        """Form the penalty's gradient where the parameters are now. Collective under ZeRO-3."""
        parameters = list(self._parameters.values())
        with torch.no_grad(), sharding.gathered(parameters):
            for name, parameter in self._parameters.items():
                self._gradients[name] = self._weights[name] * parameter.float() - self._pulls[name]

    def _with_penalty(self, gradient: Tensor, name: str, passes: int) -> Tensor:
        if name not in self._gradients:  # outside of a step
            return gradient
        return gradient + (self._gradients[name] / passes).to(gradient.dtype)

    def after_step(self) -> None:
        """Until the next step no backward pass is the task's."""
        self._gradients.clear()


def fisher_information(trainer: Trainer, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information of every trained parameter, whole, fp32, on the CPU.

    The mean over examples of the squared gradient of log p(answer | prompt), the sum over the answer's
    tokens. The ranks share the examples; the order in which squares are added up depends on their number.

    Args:
        rows: examples, `input_ids` and `labels` each.
    """
    parameters = trainable(trainer.model)
    sums = {name: torch.zeros(sharding.full_shape(p), device=p.device) for name, p in parameters.items()}
    share = range(rank(), -(-len(rows) // world_size()) * world_size(), world_size())
    model, was_training = trainer.model, trainer.model.training
    model.eval()
    for index in tqdm(share, desc="Fisher information", unit="example", disable=not is_main_process()):
        with trainer.compute_loss_context_manager():
            loss = _negative_log_likelihood(trainer, rows[min(index, len(rows) - 1)])
        # Not `backward`: DeepSpeed would average gradients over ranks before they can be squared.
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        if index < len(rows):
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total.addcmul_(gradient.float(), gradient.float())
    model.train(was_training)
    for total in sums.values():
        if world_size() > 1:
            torch.distributed.all_reduce(total)
        total.div_(len(rows))
    return {name: total.cpu() for name, total in sums.items()}


def _negative_log_likelihood(trainer: Trainer, row: Mapping[str, Any]) -> Tensor:
    device = trainer.args.device
    ids = torch.tensor([row["input_ids"]], device=device)
    targets = F.pad(torch.tensor([row["labels"]], device=device)[:, 1:], (0, 1), value=IGNORED)
    if trainer.summed_loss:
        loss: Tensor = trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids), targets=targets)
        return loss
    logits = trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return F.cross_entropy(logits[0].float(), targets[0], ignore_index=IGNORED, reduction="sum")


def values_of(trainer: Trainer) -> dict[str, Tensor]:
    """Every trained parameter, whole, fp32, on the CPU. Collective."""
    return {name: sharding.whole(p).float() for name, p in trainable(trainer.model).items()}

"""One pass of text forward and back through a model, block by block, in the memory of one block.

The forward pass leaves every block's input in main memory, from which the block runs again on the way back,
for all batches before it is the next block's turn: under ZeRO-3 a block is whole once, and what was measured
in it can be dealt with before anything else is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from secura_ds import sharding
from secura_ds.backbones.head import computes_summed_loss, summed_cross_entropy
from secura_ds.calibration.ranks import turns
from secura_ds.data.encoding import IGNORED
from secura_ds.errors import UserError


class Batch(NamedTuple):
    """Sequences padded to one length: ids, whether a token is real, and the token to be predicted next.

    All are (sequences, length) int64; `targets` are `IGNORED` where nothing is learnt.
    """

    ids: Tensor
    mask: Tensor
    targets: Tensor


class Walk:
    """This rank's share of `batches` on its way back through the blocks, the last one first. Collective.

    Args:
        bar: advanced for each batch forward and for each block that is visited.

    Raises:
        UserError: of this model's family it is not known what comes between its blocks and its loss.
    """

    def __init__(self, model: Any, batches: Sequence[Batch], bar: tqdm) -> None:
        self.blocks, self.batches, self.bar = decoder_blocks(model), batches, bar
        self.device = batches[0].ids.device
        self._turns = turns(len(batches))
        self._calls: list[list[_Call]] = []
        outputs = []
        with sharding.gathered_forward(model):
            for index, _ in self._turns:
                batch = batches[index]
                with _recorded(self.blocks) as calls:
                    model.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
                outputs.append(calls[-1].output)
                self._calls.append([call._replace(output=torch.empty(0)) for call in calls])
                bar.update()
        targets = [batches[index].targets for index, _ in self._turns]
        # By the output of block `_at`, and by its input where it has been visited; one for each turn.
        self._at = len(self.blocks) - 1
        self._gradients = _of_loss(model, outputs, targets)
        self._below: list[Tensor] = []

    def visit(self, number: int, arrive: Callable[[int, bool], None]) -> None:
        """Run block `number` forward and backward over every batch; hooks on its layers see both.

        Args:
            arrive: called with a batch's index before it, and with whether this rank is the one to count it.

        Raises:
            ValueError: the walk is below that block already.
        """
        if number > self._at:
            raise ValueError(f"block {number} is visited after block {self._at}")
        while self._at > number:
            self._gradients, self._below = self._below or self._back(lambda index, counts: None), []
            self._at -= 1
            for calls in self._calls:
                calls.pop()
        self._below = self._back(arrive)
        self.bar.update()

    def _back(self, arrive: Callable[[int, bool], None]) -> list[Tensor]:
        block, below = self.blocks[self._at], []
        with torch.enable_grad(), sharding.gathered(block.parameters()):
            for calls, gradient, (index, counts) in zip(
                self._calls, self._gradients, self._turns, strict=True
            ):
                arrive(index, counts)
                call = calls[self._at]
                hidden = call.hidden.to(self.device).detach().requires_grad_()
                output = _hidden_of(block(hidden, *call.arguments, **call.settings))
                below.append(torch.autograd.grad(output, hidden, gradient)[0])
        return below


def decoder_blocks(model: Any) -> nn.ModuleList:
    """The blocks of a model whose loss this module can differentiate block by block.

    Raises:
        UserError: the family is none of those.
    """
    blocks = getattr(model.base_model, "layers", None)
    if not computes_summed_loss(model) or not isinstance(blocks, nn.ModuleList):
        raise UserError(
            f"calibration.mode 'contrast' does not know how a {model.config.model_type} model's loss follows "
            "from its blocks: use another mode"
        )
    return blocks


def block_numbers(blocks: nn.ModuleList, layers: Mapping[str, nn.Linear]) -> dict[str, int]:
    """The number of the block in which each layer lies, by its name.

    Raises:
        UserError: a layer lies in none.
    """
    inside = {id(module): number for number, block in enumerate(blocks) for module in block.modules()}
    for name, layer in layers.items():
        if id(layer) not in inside:
            raise UserError(
                f"{name} lies outside the model's blocks, where calibration.mode 'contrast' cannot look: "
                "leave it out of target_modules, or use another mode"
            )
    return {name: inside[id(layer)] for name, layer in layers.items()}


def _of_loss(model: Any, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the summed loss of each batch by what the last block returns."""
    norm, head = model.base_model.norm, model.get_output_embeddings()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    gradients = []
    with torch.enable_grad(), sharding.gathered([*norm.parameters(), *head.parameters()]):
        for output, of_batch in zip(outputs, targets, strict=True):
            learnt = of_batch != IGNORED
            hidden = output.detach().requires_grad_()
            loss = summed_cross_entropy(
                norm(hidden)[learnt], head.weight, head.bias, of_batch[learnt], softcap
            )
            gradients.append(torch.autograd.grad(loss, hidden)[0])
    return gradients


class _Call(NamedTuple):
    """How a block was called, its input in main memory, and what it returned."""

    hidden: Tensor
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    output: Tensor


@contextmanager
def _recorded(blocks: nn.ModuleList) -> Iterator[list[_Call]]:
    """The blocks' calls inside the context, in their order; the output of the last one."""
    calls: list[_Call] = []

    def keep(block: nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any], output: Any) -> None:
        kept = _hidden_of(output) if block is blocks[-1] else torch.empty(0)
        calls.append(_Call(arguments[0].cpu(), arguments[1:], settings, kept))

    handles = [block.register_forward_hook(keep, with_kwargs=True) for block in blocks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden

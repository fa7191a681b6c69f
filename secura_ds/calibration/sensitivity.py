"""What excites layers and what their outputs matter for: S = E[x x^T] and F = E[g g^T] of a batch of text.

x is a layer's input (tokens, in), g the gradient of the summed loss by its output (tokens, out). The backward
pass goes block by block, each run again from its input: under ZeRO-3 one block at a time is whole, and one
block's activations exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from secura_ds import sharding
from secura_ds.backbones.head import computes_summed_loss, summed_cross_entropy
from secura_ds.calibration.moments import FORWARD_BATCH, InputGroup, Moment, Sum
from secura_ds.calibration.ranks import rank_and_world, sum_to, turns
from secura_ds.data.encoding import IGNORED
from secura_ds.errors import UserError


class Batch(NamedTuple):
    """Sequences padded to one length: ids, whether a token is real, and the token to be predicted next.

    All are (sequences, length) int64; `targets` are `IGNORED` where nothing is learnt.
    """

    ids: Tensor
    mask: Tensor
    targets: Tensor


class Sensitivity(NamedTuple):
    """Second moments of one group of layers with the same input."""

    inputs: Moment
    """S (in, in), mean over tokens."""
    gradients: dict[str, Moment]
    """F (out, out) of each layer, by name, mean over learnt tokens."""

    def averaged(self, other: Sensitivity) -> Sensitivity:
        """What leaves both alone, by halves: a sum would make every direction dearer, and rates too low."""
        gradients = {name: F.averaged(other.gradients[name]) for name, F in self.gradients.items()}
        return Sensitivity(self.inputs.averaged(other.inputs), gradients)


def num_tokens(batches: Sequence[Batch]) -> int:
    """Real tokens of `batches`: the rows of every moment of them."""
    return sum(int(batch.mask.sum()) for batch in batches)


def text_batches(token_ids: Tensor) -> list[Batch]:
    """Batches of whole sequences (n, length) that the model predicts all of."""
    targets = torch.nn.functional.pad(token_ids[:, 1:], (0, 1), value=IGNORED)
    parts = zip(token_ids.split(FORWARD_BATCH), targets.split(FORWARD_BATCH), strict=True)
    return [Batch(ids, torch.ones_like(ids), part) for ids, part in parts]


def example_batches(rows: Sequence[Mapping[str, Any]], num_tokens: float = math.inf) -> list[Batch]:
    """Batches of the first training examples that hold `num_tokens` tokens in all, as training learns them.

    Raises:
        UserError: there is none, or nothing is learnt of them.
    """
    chosen: list[tuple[list[int], list[int]]] = []
    held = 0
    for row in rows:
        if held >= num_tokens:
            break
        tokens, labels = list(row["input_ids"]), list(row["labels"])
        held += len(tokens)
        # A packed row holds several examples, each of which is learnt by itself.
        for length in row.get("seq_lengths") or [len(tokens)]:
            chosen.append((tokens[:length], labels[:length]))
            tokens, labels = tokens[length:], labels[length:]
    if not any(label != IGNORED for _, labels in chosen for label in labels[1:]):
        raise UserError(
            "calibration.mode is 'contrast', but the training examples have no token that is learnt"
        )
    return [_padded(chosen[i : i + FORWARD_BATCH]) for i in range(0, len(chosen), FORWARD_BATCH)]


def _padded(examples: Sequence[tuple[list[int], list[int]]]) -> Batch:
    shape = len(examples), max(len(ids) for ids, _ in examples)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    targets = torch.full(shape, IGNORED)
    for row, (tokens, labels) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        targets[row, : len(tokens) - 1] = torch.tensor(labels[1:])
    return Batch(ids, mask, targets)


def sensitivities(
    model: Any,
    groups: Sequence[InputGroup],
    layers: Mapping[str, nn.Linear],
    owner: Sequence[int],
    batches: Sequence[Batch],
    bar: tqdm,
    keeps_rows: Callable[[int], bool] = lambda width: False,
) -> list[Sensitivity | None]:
    """S and F of each group on the rank that owns it, None elsewhere. Collective: the ranks share batches.

    Products are formed in fp32 and added up in double, so that the sums have the same bits for any number
    of ranks; so have rows, each of which one rank fills in.

    Args:
        keeps_rows: whether a moment of that width is kept as rows.

    Raises:
        UserError: of this model's family it is not known what comes between its blocks and its loss.
    """
    rank, _ = rank_and_world()
    blocks = decoder_blocks(model)
    device, tokens = batches[0].ids.device, num_tokens(batches)

    def empty(width: int) -> Sum:
        return Sum(width, tokens, keeps_rows(width), device)

    of_inputs = {g.names[0]: empty(g.leader.in_features) for g in groups}
    of_gradients = {n: empty(layers[n].out_features) for g in groups for n in g.names}
    leaders = {id(g.leader): g.names[0] for g in groups}
    names = {id(layers[n]): n for n in of_gradients}
    starts = [0, *accumulate(num_tokens([batch]) for batch in batches)]
    mask, start, counting = torch.empty(0), 0, True

    def visit(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not (counting and output.requires_grad):
            return
        real, first = mask, start  # the hook below runs in the backward pass of the same batch
        if id(module) in leaders:
            of_inputs[leaders[id(module)]].add(inputs[0][real], first)
        total = of_gradients[names[id(module)]]
        output.register_hook(lambda gradient: total.add(gradient[real], first))

    handles = [layers[name].register_forward_hook(visit) for name in of_gradients]
    try:
        for index, counting in turns(len(batches)):  # noqa: B007 - read by the hook
            mask, start = batches[index].mask.bool(), starts[index]
            _differentiate(model, blocks, batches[index])
            bar.update()
    finally:
        for handle in handles:
            handle.remove()
    learnt = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
    found: list[Sensitivity | None] = []
    for group, destination in zip(groups, owner, strict=True):
        sums = [of_inputs[group.names[0]], *(of_gradients[name] for name in group.names)]
        for total in sums:
            sum_to(total.total, destination)
        found.append(None)
        if destination == rank:
            F = {n: total.mean(learnt) for n, total in zip(group.names, sums[1:], strict=True)}
            found[-1] = Sensitivity(sums[0].mean(tokens), F)
    return found


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


def _differentiate(model: Any, blocks: nn.ModuleList, batch: Batch) -> None:
    """Run a batch forward, and backward through every block; hooks on layers see both."""
    with _recorded(blocks) as calls, sharding.gathered_forward(model):
        model.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    gradient = _of_loss(model, calls[-1].output, batch.targets)
    for block, call in zip(reversed(blocks), reversed(calls), strict=True):
        with torch.enable_grad(), sharding.gathered(block.parameters()):
            hidden = call.hidden.detach().requires_grad_()
            output = _hidden_of(block(hidden, *call.arguments, **call.settings))
            (gradient,) = torch.autograd.grad(output, hidden, gradient)


def _of_loss(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Gradient of the summed loss by what the last block returns."""
    norm, head = model.base_model.norm, model.get_output_embeddings()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    learnt = targets != IGNORED
    with torch.enable_grad(), sharding.gathered([*norm.parameters(), *head.parameters()]):
        hidden = hidden.detach().requires_grad_()
        loss = summed_cross_entropy(norm(hidden)[learnt], head.weight, head.bias, targets[learnt], softcap)
        gradient: Tensor = torch.autograd.grad(loss, hidden)[0]
    return gradient


class _Call(NamedTuple):
    """How a block was called, and what it returned."""

    hidden: Tensor
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    output: Tensor


@contextmanager
def _recorded(blocks: nn.ModuleList) -> Iterator[list[_Call]]:
    """The blocks' calls inside the context, in their order."""
    calls: list[_Call] = []

    def keep(_block: nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any], output: Any) -> None:
        calls.append(_Call(arguments[0], arguments[1:], settings, _hidden_of(output)))

    handles = [block.register_forward_hook(keep, with_kwargs=True) for block in blocks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden

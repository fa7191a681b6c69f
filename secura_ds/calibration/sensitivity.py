"""What excites layers and what their outputs matter for: S = E[x x^T] and F = E[g g^T] of a batch of text.

x is a layer's input (tokens, in), g the gradient of the summed loss by its output (tokens, out).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secura_ds.calibration.moments import FORWARD_BATCH, InputGroup, Moment, Sum
from secura_ds.calibration.ranks import rank_and_world, sum_to
from secura_ds.calibration.walk import Batch, Walk, block_numbers
from secura_ds.data.encoding import IGNORED
from secura_ds.errors import UserError


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
    walk: Walk,
    groups: Sequence[InputGroup],
    layers: Mapping[str, nn.Linear],
    owner: Sequence[int],
    keeps_rows: Callable[[int], bool] = lambda width: False,
) -> list[Sensitivity | None]:
    """S and F of each group on the rank that owns it, None elsewhere. Collective: the ranks share batches.

    Products are formed in fp32 and added up in double, so that the sums have the same bits for any number
    of ranks; so have rows, each of which one rank fills in.

    Args:
        walk: of the text, at the last of the groups' blocks or above it.
        keeps_rows: whether a moment of that width is kept as rows.
    """
    rank, _ = rank_and_world()
    batches, tokens = walk.batches, num_tokens(walk.batches)

    def empty(width: int) -> Sum:
        return Sum(width, tokens, keeps_rows(width), walk.device)

    of_inputs = {g.names[0]: empty(g.leader.in_features) for g in groups}
    of_gradients = {n: empty(layers[n].out_features) for g in groups for n in g.names}
    leading = {g.names[0]: g.leader for g in groups}
    leaders = {id(layer): name for name, layer in leading.items()}
    names = {id(layers[n]): n for n in of_gradients}
    masks = [batch.mask.bool() for batch in batches]
    starts = [0, *accumulate(int(mask.sum()) for mask in masks)]
    at, counting = 0, True

    def arrive(index: int, counts: bool) -> None:
        nonlocal at, counting
        at, counting = index, counts

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not counting:
            return
        real, first = masks[at], starts[at]
        if id(module) in leaders:
            of_inputs[leaders[id(module)]].add(inputs[0][real], first)
        total = of_gradients[names[id(module)]]
        output.register_hook(lambda gradient: total.add(gradient[real], first))

    handles = [layers[name].register_forward_hook(look) for name in of_gradients]
    try:
        for number in sorted(set(block_numbers(walk.blocks, leading).values()), reverse=True):
            walk.visit(number, arrive)
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

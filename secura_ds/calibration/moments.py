"""Second moments S = E[x x^T] of what layers take and give, in bounded memory (method.md section 7)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from secura_ds.calibration.ranks import rank_and_world, sum_to, turns
from secura_ds.errors import UserError

# Fixed, so that the partial sums, and so S, do not depend on the number of ranks.
FORWARD_BATCH = 8

# Rows of S formed at once: only the part of S on and above its diagonal is computed.
_PANEL = 256


class InputGroup(NamedTuple):
    """Layers that read one and the same tensor, such as q, k and v; the first of them stands for all."""

    names: list[str]
    leader: nn.Linear


def input_groups(body: nn.Module, layers: Mapping[str, nn.Linear], token_ids: Tensor) -> list[InputGroup]:
    """Group `layers` by the input that they share, in the order in which a forward reaches them.

    Raises:
        UserError: a layer is not reached by a forward of the model.
    """
    groups: list[InputGroup] = []
    last: list[Tensor] = []

    def visit(name: str, module: nn.Linear, x: Tensor) -> None:
        if any(name in group.names for group in groups):
            return
        if last and last[0] is x:
            groups[-1].names.append(name)
        else:
            groups.append(InputGroup([name], module))
            last[:] = [x]

    handles = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: visit(name, module, inputs[0]))
        for name, module in layers.items()
    ]
    try:
        body(input_ids=token_ids[:1, :1], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    missed = sorted(set(layers) - {name for group in groups for name in group.names})
    if missed:
        raise UserError(f"{missed[0]} is not reached by the model's forward: leave it out of target_modules")
    return groups


class Moment(NamedTuple):
    """A second moment (n, n) in fp32: itself, or rows X (tokens, n) with X^T X equal to it."""

    values: Tensor
    is_rows: bool

    def averaged(self, other: Moment) -> Moment:
        """The mean of this and another one that is kept in the same way."""
        if self.is_rows:
            return Moment(torch.cat([self.values, other.values]).div_(math.sqrt(2)), True)
        return Moment((self.values + other.values) / 2, False)


class Sum:
    """A second moment that is being added up: products in double, or rows where they are fewer than `width`.

    Args:
        width: n, of the vectors.
        num_rows: how many vectors come.
        keep_rows: whether to keep them in place of their products.
    """

    def __init__(self, width: int, num_rows: int, keep_rows: bool, device: torch.device) -> None:
        self._keeps_rows = keep_rows
        shape, dtype = ((num_rows, width), torch.float32) if keep_rows else ((width, width), torch.float64)
        self.total = torch.zeros(shape, dtype=dtype, device=device)

    def add(self, vectors: Tensor, start: int) -> None:
        """Count `vectors` (k, n), of which the first is number `start` of all."""
        if self._keeps_rows:
            self.total[start : start + len(vectors)] = vectors.detach()
        else:
            add_products(self.total, vectors)

    def mean(self, count: int) -> Moment:
        """The moment as a mean over `count` vectors; what was added up is used for it."""
        if self._keeps_rows:
            return Moment(self.total.div_(math.sqrt(count)), True)
        return Moment(symmetric(self.total, count), False)


def moment_bytes(width: int, num_rows: int, keep_rows: bool) -> int:
    """What a `Sum` takes."""
    return 4 * num_rows * width if keep_rows else 8 * width**2


def within_memory(
    groups: Sequence[InputGroup], memory_limit: int, size: Callable[[InputGroup], int]
) -> Iterator[list[InputGroup]]:
    """Cut `groups` into runs whose moments fit `memory_limit` bytes; one group at least.

    Args:
        size: bytes of the moments of a group.
    """
    run: list[InputGroup] = []
    held = 0
    for group in groups:
        needed = size(group)
        if run and held + needed > memory_limit:
            yield run
            run, held = [], 0
        run.append(group)
        held += needed
    yield run


def owners(groups: Sequence[InputGroup]) -> list[int]:
    """The rank that decomposes each group's moment: dealt out by width, so that the work is even."""
    widest_first = sorted(range(len(groups)), key=lambda i: -groups[i].leader.in_features)
    world = rank_and_world()[1]
    dealt = {group: turn % world for turn, group in enumerate(widest_first)}
    return [dealt[i] for i in range(len(groups))]


def second_moments(
    body: nn.Module, groups: Sequence[InputGroup], owner: Sequence[int], token_ids: Tensor, bar: tqdm
) -> list[Tensor | None]:
    """S (in, in) in fp32 of each group on the rank that owns it, None elsewhere.

    The ranks share the sequences. Products are formed in fp32 and added up in double, where sums are exact
    but for the rarest cancellation: S has the same bits for any number of ranks.
    """
    rank, _ = rank_and_world()
    device = token_ids.device
    widths = [group.leader.in_features for group in groups]
    sums = [torch.zeros(width, width, dtype=torch.float64, device=device) for width in widths]
    counting = True

    def add(total: Tensor, x: Tensor) -> None:
        if counting:
            add_products(total, x)

    handles = [
        group.leader.register_forward_pre_hook(lambda _, inputs, total=total: add(total, inputs[0]))
        for group, total in zip(groups, sums, strict=True)
    ]
    try:
        batches = token_ids.split(FORWARD_BATCH)
        for index, counting in turns(len(batches)):  # noqa: B007 - read by the hooks
            body(input_ids=batches[index], use_cache=False)
            bar.update()
    finally:
        for handle in handles:
            handle.remove()
    moments: list[Tensor | None] = []
    for i, total in enumerate(sums):
        sum_to(total, owner[i])
        moments.append(symmetric(total, token_ids.numel()) if owner[i] == rank else None)
        sums[i] = torch.empty(0)
    return moments


def add_products(total: Tensor, x: Tensor) -> None:
    """Add x^T x of x (..., n) to the upper half of `total` (n, n), products in fp32."""
    with torch.autocast(x.device.type, enabled=False):
        flat = x.detach().flatten(0, -2).float()
        for start in range(0, flat.shape[1], _PANEL):
            panel = flat[:, start : start + _PANEL]
            total[start : start + _PANEL, start:] += panel.T @ flat[:, start:]


def symmetric(upper: Tensor, count: int) -> Tensor:
    """The whole S (in, in) in fp32 from the sum over `count` tokens of its upper half."""
    moment = upper.div_(count).float().triu_()
    return moment.add_(moment.triu(1).T)

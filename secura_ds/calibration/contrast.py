"""C and R of mode "contrast": where the task asks much of a layer, and general text asks little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from secura_ds.adapter.config import SecuraConfig, by_layer
from secura_ds.calibration.moments import InputGroup, Moment, moment_bytes, owners, within_memory
from secura_ds.calibration.ranks import broadcast, raise_together, turns
from secura_ds.calibration.sensitivity import Sensitivity, num_tokens, sensitivities
from secura_ds.calibration.walk import Batch, Walk, block_numbers, decoder_blocks
from secura_ds.method.contrast import contrast, contrast_of_rows, contrast_scale


def contrast_factors(
    model: Any,
    layers: Mapping[str, nn.Linear],
    groups: Sequence[InputGroup],
    general: Sequence[Batch],
    task: Sequence[Batch],
    config: SecuraConfig,
    *,
    earlier: Sequence[Batch],
    memory_limit: int,
    show: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """R (r, in) and C (out, r) of every layer, in fp32 on CPU, by name. Collective; all ranks get the same.

    Args:
        groups: `layers` by the input that they share.
        general, task: the text to leave as it is, and the examples to be learnt.
        earlier: examples of earlier tasks, to leave as they are, too; empty for none.
        memory_limit: bytes that second moments may take; a block of more is looked at in parts.

    Raises:
        UserError: an unknown family; a layer outside the blocks, or that general text or the task does not
            reach.
    """
    device, numbers = general[0].ids.device, block_numbers(decoder_blocks(model), layers)
    texts = [batches for batches in (general, task, earlier) if batches]
    tokens = [num_tokens(batches) for batches in texts]

    def keeps_rows(width: int) -> bool:
        return sum(tokens) <= width

    def size(group: InputGroup) -> int:
        widths = [group.leader.in_features, *(layers[name].out_features for name in group.names)]
        return sum(moment_bytes(width, n, keeps_rows(width)) for width in widths for n in tokens)

    # From the last block to the first, as the walks go.
    runs = list(within_memory(groups[::-1], memory_limit, size))
    visits = len(texts) * sum(len({numbers[group.names[0]] for group in run}) for run in runs)
    forwards = sum(len(turns(len(batches))) for batches in texts)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    total = forwards + visits + len(layers)
    with tqdm(total=total, desc="calibration: contrast", disable=not show) as bar:
        walks = [Walk(model, batches, bar) for batches in texts]
        for run in runs:
            owner = owners(run)
            of_text, of_task, *of_earlier = (
                sensitivities(walk, run, layers, owner, keeps_rows) for walk in walks
            )
            for found in of_earlier:
                pairs = zip(of_text, found, strict=True)
                of_text = [a.averaged(b) if a is not None and b is not None else a for a, b in pairs]
            _solve(run, owner, of_text, of_task, layers, config, (inputs, outputs), device, bar)
    return {name: inputs[name] for name in layers}, {name: outputs[name] for name in layers}


def _solve(
    groups: Sequence[InputGroup],
    owner: Sequence[int],
    general: Sequence[Sensitivity | None],
    task: Sequence[Sensitivity | None],
    layers: Mapping[str, nn.Linear],
    config: SecuraConfig,
    found: tuple[dict[str, Tensor], dict[str, Tensor]],
    device: torch.device,
    bar: tqdm,
) -> None:
    """Add the factors of every layer of `groups` to `found`: computed where its moments lie, then sent.

    All decompositions come before the first collective, so that the ranks work at the same time.
    """
    problems: list[str] = []
    solved: dict[str, tuple[Tensor, Tensor]] = {}
    for group, of_text, of_task in zip(groups, general, task, strict=True):
        if of_text is not None and of_task is not None:
            shared: dict[int, Tensor] = {}
            for name in group.names:
                try:
                    solved[name] = _factors(name, of_text, of_task, len(layers), config, shared)
                except (ValueError, torch.linalg.LinAlgError) as error:
                    problems.append(f"{name}: {error}")
                bar.update()
    raise_together(problems)
    for group, source in zip(groups, owner, strict=True):
        for name in group.names:
            layer, r = layers[name], by_layer(config.rank_pattern, name, config.cur_rank)
            shapes = (r, layer.in_features), (layer.out_features, r)
            for place, shape, i in zip(found, shapes, (0, 1), strict=True):
                factor = solved[name][i] if name in solved else torch.zeros(shape, device=device)
                broadcast(factor, source)
                place[name] = factor.cpu()


def _factors(
    name: str,
    general: Sensitivity,
    task: Sensitivity,
    num_layers: int,
    config: SecuraConfig,
    shared: dict[int, Tensor],
) -> tuple[Tensor, Tensor]:
    """R and C of one layer; `shared` holds R by r, for the layers with the same input."""
    r = by_layer(config.rank_pattern, name, config.cur_rank)
    floor = config.calibration["floor"]
    if r not in shared:
        shared[r] = _directions(task.inputs, general.inputs, r, floor).T.contiguous()
    C = _directions(task.gradients[name], general.gradients[name], r, floor)
    return shared[r].clone(), C.mul_(contrast_scale(r, num_layers))


def _directions(task: Moment, general: Moment, rank: int, floor: float) -> Tensor:
    compute = contrast_of_rows if task.is_rows else contrast
    return compute(task.values, general.values, rank, floor)

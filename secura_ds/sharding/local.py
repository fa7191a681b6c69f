"""A rank's own part of trained parameters: read it, exchange it, and make whole tensors of such parts.

For a parameter that is not sharded the part is the whole parameter. Parts need no communication, so that an
average over time, say, costs each rank its share only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from secura_ds.sharding.partition import full_shape, is_available, is_sharded, settle, slice_of


def local_part(parameter: Parameter) -> Tensor:
    """What this rank holds of a parameter: its flat, padded slice, or the parameter itself; no copy."""
    return parameter.ds_tensor.detach() if is_sharded(parameter) else parameter.detach()


def put_local_parts(parameters: Sequence[Parameter], parts: Sequence[Tensor]) -> None:
    """Overwrite this rank's parts, cast to the parameters' dtype; an optimizer's fp32 master stays as it is.

    Between forward passes, on every rank: a sharded parameter that DeepSpeed keeps whole is gathered again.
    """
    settle(parameters)
    kept_whole = [p for p in parameters if is_sharded(p) and is_available(p)]
    for parameter in kept_whole:
        parameter.partition()
    for parameter, part in zip(parameters, parts, strict=True):
        local_part(parameter).copy_(part)
    if kept_whole:
        kept_whole[0].all_gather(kept_whole)


def whole_of_part(parameter: Parameter, part: Tensor) -> Tensor:
    """The whole tensor, on the CPU, of which every rank has a part cut as `parameter` is. Collective."""
    if not is_sharded(parameter):
        return part.detach().to("cpu", copy=True)
    part = part.contiguous().to(parameter.device)  # offloaded parts lie where ranks cannot exchange them
    parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, part)
    shape = full_shape(parameter)
    return torch.cat(parts)[: shape.numel()].view(shape).cpu()


def part_of_whole(parameter: Parameter, value: Tensor) -> Tensor:
    """This rank's part of a whole tensor, cut as `parameter` is, on the parameter's device; a copy."""
    part = slice_of(parameter, value) if is_sharded(parameter) else value
    return part.to(local_part(parameter).device, copy=True)

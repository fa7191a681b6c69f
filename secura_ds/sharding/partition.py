"""Weights that DeepSpeed ZeRO-3 has cut into one slice per rank: reading, writing and gathering them.

Together with `quantized` and `fold` this is the only place that knows DeepSpeed's `ds_*` attributes.
Every function that gathers or writes is collective: all ranks call it, with the same parameters in the
same order. DeepSpeed is imported only for parameters that are sharded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from secura_ds.errors import UserError


def is_sharded(parameter: Tensor) -> bool:
    """True if ZeRO-3 owns `parameter`, gathered at this moment or not."""
    return hasattr(parameter, "ds_id")


def is_available(parameter: Tensor) -> bool:
    """True if the whole of `parameter` can be read now."""
    return not is_sharded(parameter) or parameter.ds_status.name == "AVAILABLE"


def full_shape(parameter: Tensor) -> torch.Size:
    """The whole shape of `parameter`, also where this rank holds a slice only."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def settle(parameters: Iterable[Tensor]) -> None:
    """End the gathers that ZeRO-3 has begun for a pass that did not follow, and let go of what they brought.

    An evaluation leaves some, as its forward pass fetches ahead for a backward pass. Between steps, on every
    rank; nothing is sent.
    """
    for parameter in parameters:
        if is_sharded(parameter) and parameter.ds_status.name == "INFLIGHT":
            in_flight = parameter._z3_optimizer.module.ds_inflight_param_registry
            for fetched, handle in in_flight.items():
                handle.wait()
                fetched.partition()
            in_flight.clear()


@contextmanager
def gathered(parameters: Parameter | Iterable[Parameter], *, writable: bool = False) -> Iterator[None]:
    """Whole parameters inside the block, slices again after it.

    Args:
        parameters: one or several; those that are not sharded or already whole are left alone.
        writable: what rank 0 holds at the end of the block becomes the new value on every rank.
    """
    wanted = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    settle(wanted)
    wanted = [p for p in wanted if is_sharded(p) and (writable or not is_available(p))]
    if not wanted:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(wanted, modifier_rank=0 if writable else None):
        yield


def whole(parameter: Parameter, *, keep: bool = True) -> Tensor:
    """A CPU copy of the whole parameter, on every rank; ranks with `keep=False` only take part."""
    with gathered(parameter):
        return parameter.detach().to("cpu", copy=True) if keep else torch.empty(0)


def set_parameter(parameter: Parameter, value: Tensor) -> None:
    """Write a whole `value` into `parameter`, its slices and, where an optimizer holds one, its fp32 master.

    Raises:
        UserError: `value` has another shape.
    """
    if value.shape != full_shape(parameter):
        raise UserError(
            f"a value of shape {tuple(value.shape)} does not fit a parameter of shape "
            f"{tuple(full_shape(parameter))}: use the checkpoint that belongs to this model"
        )
    with torch.no_grad(), gathered(parameter, writable=True):
        parameter.copy_(value)
    if not _has_master(parameter):
        return
    value = value.to(parameter.device, torch.float32)
    if is_sharded(parameter):
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(parameter, slice_of(parameter, value))
    else:
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value)


def slice_of(parameter: Parameter, value: Tensor) -> Tensor:
    """This rank's part of a whole `value` for a sharded parameter, flat and padded as its slice is.

    DeepSpeed's own setters of whole values fail where the ranks do not divide the number of elements.
    """
    size, rank = parameter.ds_tensor.numel(), parameter.ds_zero_partition_rank
    part = value.flatten()[size * rank : size * (rank + 1)]
    return torch.nn.functional.pad(part, (0, size - part.numel()))


def zero_(parameter: Parameter) -> None:
    """Set `parameter` and its fp32 master to 0 on every rank, moving no data between ranks."""
    if not is_sharded(parameter):
        parameter.detach().zero_()
        if _has_master(parameter):
            set_parameter(parameter, torch.zeros_like(parameter))
        return
    settle([parameter])
    if is_available(parameter):
        parameter.detach().zero_()
    parameter.ds_tensor.data.zero_()
    if _has_master(parameter):
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        safe_set_local_fp32_param(parameter, torch.zeros_like(safe_get_local_fp32_param(parameter)))


def _has_master(parameter: Parameter) -> bool:
    """True if a DeepSpeed optimizer (any ZeRO stage) keeps an fp32 copy of this parameter."""
    sharded = hasattr(parameter, "_z3_optimizer") and parameter.requires_grad
    return sharded or getattr(parameter, "_hp_mapping", None) is not None


def use_in_forward(module: nn.Module, parameters: Sequence[Parameter | None]) -> None:
    """Tell ZeRO-3 that `module` reads parameters it does not own, so that it gathers them, both ways."""
    for parameter in parameters:
        if parameter is not None and is_sharded(parameter):
            from deepspeed.runtime.zero import register_external_parameter

            register_external_parameter(module, parameter)


@contextmanager
def gathered_forward(model: nn.Module, *, keep_bytes: int = 0) -> Iterator[None]:
    """Inside the block, forwards of a partitioned model without an engine gather one module at a time.

    Each module's own parameters (and those declared by `use_in_forward`) are whole while its forward
    runs. All ranks must run the same number of forwards. Does nothing for a model that is not sharded.

    Args:
        keep_bytes: weights of up to this many bytes in all stay whole until the block ends, as DeepSpeed's
            `stage3_max_live_parameters` lets them: a text written token by token then gathers them once.
    """
    users: Counter[int] = Counter()
    held: dict[int, Parameter] = {}
    kept: dict[int, Parameter] = {}
    handles: list[RemovableHandle] = []
    free = keep_bytes

    def enter(module: nn.Module, _inputs: tuple[object, ...]) -> None:
        nonlocal free
        for parameter in _read_by(module):
            users[id(parameter)] += 1
            if is_available(parameter):
                continue
            parameter.all_gather()
            size = parameter.numel() * parameter.element_size()
            fits = size <= free
            free -= size if fits else 0
            (kept if fits else held)[id(parameter)] = parameter

    def leave(module: nn.Module, _inputs: object, _output: object) -> None:
        for parameter in _read_by(module):
            users[id(parameter)] -= 1
            if users[id(parameter)] == 0 and held.pop(id(parameter), None) is not None:
                parameter.partition()

    settle(model.parameters())
    for module in model.modules():
        if _read_by(module):
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in (*held.values(), *kept.values()):
            parameter.partition()


def _read_by(module: nn.Module) -> list[Parameter]:
    foreign = getattr(module, "_external_params", {}).values()
    return [p for p in (*module.parameters(recurse=False), *foreign) if is_sharded(p)]


def assert_partitioned(model: nn.Module) -> None:
    """Check that every frozen weight is a slice, so that no rank silently holds the whole model.

    Weights that DeepSpeed was told to keep whole (`stage3_param_persistence_threshold`) are in order.

    Raises:
        UserError: names the first offending weight and how many there are.
    """
    frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
    wrong = [n for n, p in frozen if not is_sharded(p) or (is_available(p) and not p.ds_persist)]
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(frozen)} frozen weights are whole on every rank, the first is {wrong[0]}: "
            "create the HfDeepSpeedConfig before loading the model and keep it alive"
        )

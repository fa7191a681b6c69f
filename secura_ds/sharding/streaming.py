"""Loading under ZeRO-3 one tensor at a time: read, quantize where the layer is 4-bit, cut into slices, next.

DeepSpeed cuts a model into slices as its modules are made, but a 4-bit weight exists only once the real one
has been read; transformers therefore puts the whole 4-bit model on every rank first. Here no rank ever holds
more than its slices, the 4-bit constants and the tensor at hand, in device or host memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from secura_ds.sharding.quantized import compute_dtype, is_quantized, quantized_parameter


def load_slices(
    model: nn.Module,
    read: Callable[[str], Tensor],
    settings: dict[str, Any],
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> None:
    """Give every parameter of a model on the meta device its weight, each rank its slice. Collective.

    Args:
        model: parameters on the meta device, 4-bit layers already in place of linear ones.
        read: returns the whole tensor of a parameter's name, on the CPU, in memory of its own.
        settings: the DeepSpeed configuration, with its values filled in.
        progress: wraps the list of what is loaded, to show a bar.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import Init

    for parameter in load_parameters(
        model, read, torch.device(get_accelerator().current_device_name()), progress
    ):
        Init(module=nn.ParameterList([parameter]), config_dict_or_path=settings)
        del parameter
        _return_freed_memory()


def load_parameters(
    model: nn.Module,
    read: Callable[[str], Tensor],
    device: torch.device,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Iterator[Parameter]:
    """Put real, frozen parameters in the place of those on the meta device, and yield each once it is there.

    Parameters that several modules share are read once and stay shared. Buffers are left alone.

    Args:
        model, read, progress: as in `load_slices`; what `read` returns may be on any device.
        device: where the parameters go; 4-bit ones are quantized there.
    """
    owners: dict[Parameter, list[tuple[nn.Module, str]]] = {}
    names: dict[Parameter, str] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((module, name))
            names.setdefault(parameter, f"{prefix}.{name}" if prefix else name)
    for parameter, places in progress(list(owners.items())):
        module = places[0][0]
        # bitsandbytes makes an fp32 bias, and casts it in the first forward pass.
        dtype = compute_dtype(module) if is_quantized(module) else parameter.dtype
        value = read(names[parameter]).to(dtype)
        if is_quantized(module) and parameter is module.weight:
            loaded = quantized_parameter(module, value, device)
        else:
            loaded = Parameter(value.to(device), requires_grad=False)
        del value
        for owner, attribute in places:
            setattr(owner, attribute, loaded)
        yield loaded
        del loaded


def _return_freed_memory() -> None:
    """Give freed buffers back to the system: between small slices that stay, glibc would keep large holes."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)

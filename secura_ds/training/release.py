"""Freeing what a run held, so that the next one in the same process has the memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def release(model: nn.Module, optimizer: Any = None) -> None:
    """Empty every tensor of the model and of the optimizer (torch's or DeepSpeed's, maybe in accelerate's).

    DeepSpeed keeps models and engines of earlier runs alive for ever; what they hold on to is then small.
    """
    own = getattr(optimizer, "optimizer", optimizer)
    for tensor in (*_of_model(model), *_of_optimizer(own)):
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _of_model(model: nn.Module) -> Iterator[Tensor]:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.grad = None
        tensor._hp_mapping = None  # where DeepSpeed notes a parameter's parts of the masters and moments
        yield tensor
        if hasattr(tensor, "ds_tensor"):
            yield tensor.ds_tensor


def _of_optimizer(optimizer: Any) -> Iterator[Tensor]:
    """States, and DeepSpeed's flat masters, gradients and buckets."""
    inner = getattr(optimizer, "optimizer", optimizer)
    for state in getattr(inner, "state", {}).values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
    for value in vars(optimizer).values() if inner is not optimizer else ():
        yield from _tensors(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)

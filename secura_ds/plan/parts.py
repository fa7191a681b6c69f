"""What one process holds between steps: weights, adapter, optimizer and DeepSpeed's buffers, in bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from secura_ds.plan.blueprint import constants
from secura_ds.plan.gathering import Weight
from secura_ds.plan.kernels import rounded
from secura_ds.plan.settings import Zero

FP32 = 4
MOMENTS = 2  # of AdamW
SMALL_8BIT = 4096  # elements below which bitsandbytes keeps moments in fp32
PAGED = 100_000  # elements from which on its paged optimizers use pageable memory
BLOCK_8BIT = 256  # moments under one fp32 constant
ALIGNMENT = 2  # elements per rank that ZeRO-1 and 2 pad a flat group to (NCCL's start of 4 bytes)


@dataclass(frozen=True)
class AtRest:
    """Bytes between two steps, on the device and in host memory, and what the plan works on with."""

    device: dict[str, int]
    host: dict[str, int]
    slices: int
    """Trained elements that this rank's optimizer updates."""
    untouched: int
    """Bytes of buffers that are allocated and, for want of gradients to fill them, never written."""


def at_rest(
    model: nn.Module, zero: Zero, ranks: int, *, optimizer: str, device: str, accumulates: bool
) -> AtRest:
    """What a rank holds between two forward passes of training `model`, a model of `blueprint.draw`.

    Args:
        optimizer: its name in transformers.
        accumulates: gradients of several passes are added up before a step.
    """
    parameters = dict(model.named_parameters())
    frozen = {n: p for n, p in parameters.items() if not p.requires_grad}
    trained = {n: p for n, p in parameters.items() if p.requires_grad}
    cut = {n: weight(n, p, zero, ranks) for n, p in parameters.items()}
    sharded = zero.stage == 3

    def held(names: Iterable[str]) -> int:
        sizes = (cut[n].slice if sharded else cut[n].size for n in names)
        return sum(rounded(size, device) for size in sizes)

    itemsize = next(iter(trained.values())).element_size()
    own = [_share(p, zero, ranks) for p in trained.values()]
    slices = _padded(sum(own), zero, ranks)
    moments, paged = _moments(trained.values(), slices, zero, optimizer)
    buckets = _buckets(zero) * itemsize
    adapter, other = _buffers(model, device)
    on_device = {
        "frozen_weights": held(frozen),
        "quantization_constants": sum(
            rounded(t.nbytes, device) for p in frozen.values() for t in constants(p)
        ),
        "persistent_weights": sum(rounded(w.size, device) for w in cut.values() if w.persistent),
        "adapter_weights": held(trained) if zero.stage in (0, 3) else slices * ranks * itemsize,
        "adapter_buffers": adapter,
        "model_buffers": other,
        "gradients": slices * itemsize if sharded or accumulates else 0,
        "optimizer_state": moments,
        "fp32_masters": slices * FP32 if zero.stage and not (sharded and itemsize == FP32) else 0,
        "reduce_buckets": buckets if sharded else 0,
    }
    host = {"optimizer_state": paged}
    if zero.offload_weights:
        persistent = sum(w.slice for w in cut.values() if w.persistent)
        host["frozen_weights"] = on_device["frozen_weights"] + on_device["adapter_weights"] - persistent
        on_device["frozen_weights"], on_device["adapter_weights"] = persistent, 0
    if zero.offload_optimizer:
        for part in ("optimizer_state", "fp32_masters", "gradients"):
            host[part] = host.get(part, 0) + on_device[part]
            on_device[part] = 0
        host["gradients"] += slices * FP32  # what the optimizer steps with
    gradients = sum(p.numel() for p in trained.values()) * itemsize
    return AtRest(on_device, host, slices, max(0, buckets - gradients) if zero.contiguous_gradients else 0)


def weight(name: str, parameter: Tensor, zero: Zero, ranks: int) -> Weight:
    """A parameter as ZeRO-3 cuts it."""
    return Weight(
        name,
        parameter.numel(),
        parameter.element_size(),
        ranks,
        parameter.requires_grad,
        zero.stage == 3 and parameter.numel() <= zero.persistence,
    )


def _share(parameter: Tensor, zero: Zero, ranks: int) -> int:
    """The trained elements of a parameter that one rank's optimizer updates."""
    return math.ceil(parameter.numel() / ranks) if zero.stage == 3 else parameter.numel()


def _padded(total: int, zero: Zero, ranks: int) -> int:
    """This rank's elements of the flat group that DeepSpeed makes of all trained parameters."""
    if zero.stage in (0, 3):
        return total
    unit = ALIGNMENT * ranks
    return math.ceil(total / unit) * unit // ranks


def _buckets(zero: Zero) -> int:
    """Elements of the buffers that gradients are collected in before they are reduced."""
    if zero.stage == 0 or not zero.contiguous_gradients:
        return 0
    return zero.reduce_bucket * (2 if zero.stage != 3 and zero.overlap else 1)


def bucket_bytes(zero: Zero, itemsize: int) -> int:
    """Bytes of DeepSpeed's reduce buffers; under ZeRO-1 and 2 they live in the backward pass only."""
    return _buckets(zero) * itemsize


def _moments(trained: Iterable[Tensor], slices: int, zero: Zero, optimizer: str) -> tuple[int, int]:
    """Bytes of the optimizer's state on the device, and in pageable memory."""
    if zero.stage:
        return MOMENTS * slices * FP32, 0
    on_device = paged = 0
    for parameter in trained:
        count = parameter.numel()
        if optimizer == "adafactor":
            size = FP32 * (sum(parameter.shape) if parameter.dim() == 2 else count)
        elif "8bit" in optimizer and count >= SMALL_8BIT:
            size = MOMENTS * (count + FP32 * math.ceil(count / BLOCK_8BIT))
        else:
            size = MOMENTS * FP32 * count
        if optimizer.startswith("paged") and count >= PAGED:
            paged += size
        else:
            on_device += size
    return on_device, paged


def _buffers(model: nn.Module, device: str) -> tuple[int, int]:
    """Bytes of an adapter's frozen factors and of the model's own buffers. Whole on every rank."""
    adapter = other = 0
    seen: set[int] = set()
    for name, buffer in model.named_buffers():
        if id(buffer) in seen:
            continue
        seen.add(id(buffer))
        size = rounded(buffer.nbytes, device)
        if ".secura_" in name or "._osf_" in name:
            adapter += size
        else:
            other += size
    return adapter, other

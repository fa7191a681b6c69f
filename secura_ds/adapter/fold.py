"""Folding a trained product into the model during training, and what an adapter does to its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secura_ds import sharding
from secura_ds.adapter.config import SecuraConfig
from secura_ds.adapter.layer import Linear
from secura_ds.adapter.model import secura_layers


@torch.no_grad()
def fold(model: nn.Module, adapter_name: str = "default") -> None:
    """Fold A B by the adapter's strategy and set B to 0 (method.md section 5).

    M2 adds A B to U; M1 writes W+ over the base weight, on the slices where it is sharded. C, R, A and the
    optimizer's moments stay. Collective: every rank calls it, between optimizer steps.

    Raises:
        UserError: M1 on weights whose slices cannot be written.
    """
    layers = _with_adapter(model, adapter_name)
    if not layers:
        return
    updates = _updates(layers, adapter_name)
    config = next(iter(layers.values())).configs[adapter_name]
    if config.strategy == "M1":
        sharding.fold_slices(updates)
        config.folded = True
    else:
        for layer, update in zip(layers.values(), updates, strict=True):
            layer.secura_U[adapter_name].copy_(update.core)
    for layer in layers.values():
        sharding.zero_(layer.secura_B[adapter_name])
        if config.strategy == "M1":
            layer.forget()


@torch.no_grad()
def layer_statistics(model: nn.Module, adapter_name: str = "default") -> dict[str, dict[str, float]]:
    """`ratio_max`, `limiter_mean` and `relative_change` of every adapted layer. Collective under ZeRO-3.

    No weight is gathered, also of 4-bit layers. For apply "never" nothing is limited: the limiter is 1.
    """
    layers = _with_adapter(model, adapter_name)
    if not layers:
        return {}
    updates = _updates(layers, adapter_name)
    epsilons = sharding.absolute_epsilons(updates)
    for layer, eps in zip(layers.values(), epsilons, strict=True):
        layer.remember_eps(adapter_name, eps)
    updates = [update._replace(eps=eps) for update, eps in zip(updates, epsilons, strict=True)]
    found = sharding.slice_statistics(updates)
    return {name: statistics._asdict() for name, statistics in zip(layers, found, strict=True)}


def _updates(layers: dict[str, Linear], adapter_name: str) -> list[sharding.SliceUpdate]:
    """The layers' updates, with A and B of all of them gathered at once."""
    trained = [p for la in layers.values() for p in (la.secura_A[adapter_name], la.secura_B[adapter_name])]
    with sharding.gathered(trained):
        return [layer.slice_update(adapter_name) for layer in layers.values()]


def merged_weight(weight: Tensor, C: Tensor, core: Tensor, R: Tensor, config: SecuraConfig) -> Tensor:
    """W+ (W + D for apply "never") of one whole weight (out, in), in its dtype; computed in fp32, row blocks.

    Args:
        core: U + A B, (r, r) in fp32.
    """
    merged = weight.detach().clone(memory_format=torch.contiguous_format)
    sharding.fold_slices([sharding.SliceUpdate(merged, C, core, R, config.scaling, config.restraint)])
    return merged


def _with_adapter(model: nn.Module, adapter_name: str) -> dict[str, Linear]:
    return {name: layer for name, layer in secura_layers(model).items() if adapter_name in layer.secura_A}

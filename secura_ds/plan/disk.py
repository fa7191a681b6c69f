"""Sizes of what a run writes: checkpoints (`training.checkpoint`), the adapter and a merged model."""

from __future__ import annotations

import math

import torch
from peft import PeftModel
from torch import Tensor, nn

from secura_ds import sharding
from secura_ds.adapter import secura_layers
from secura_ds.recipe import CabrSettings, CordaAdapter, FullTraining, Recipe

FP32 = 4
MOMENTS = 2


def sizes(recipe: Recipe, model: nn.Module) -> dict[str, int]:
    """Bytes of a checkpoint, of the factors that all checkpoints share, of the adapter, of a merged model."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    buffers = {n: b.nbytes for n, b in model.named_buffers() if ".secura_" in n}
    accumulators = sum(size for name, size in buffers.items() if ".secura_U." in name)
    adapter = recipe.adapter
    # CorDA's starts are kept as its factors are, and saved with what is trained, all in fp32.
    corda = isinstance(adapter, CordaAdapter)
    factors = trained * FP32 if corda else sum(buffers.values()) - accumulators
    merged = backbone_elements(model) * getattr(torch, recipe.backbone.dtype).itemsize
    folded = in_checkpoint = 0
    if isinstance(adapter, CabrSettings):
        folded = rewritten(model) if adapter.strategy == "M1" else 0
        if adapter.fold_every:
            in_checkpoint = folded or accumulators
    moments = FP32 * (1 if recipe.training.optimizer == "adafactor" else MOMENTS)
    return {
        "checkpoint": trained * (FP32 + moments) + in_checkpoint,
        "factors": factors,
        "adapter": merged
        if isinstance(adapter, FullTraining)
        else (factors if corda else trained_bytes(model)) + factors + accumulators + folded + _starts(model),
        "merged": merged,
    }


def rewritten(model: nn.Module) -> int:
    """Bytes of the weights that M1 writes W+ into."""
    return sum(layer.get_base_layer().weight.nbytes for layer in secura_layers(model).values())


def trained_bytes(model: nn.Module) -> int:
    """Bytes of the trained parameters."""
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def elements(model: nn.Module) -> int:
    """Numbers in all parameters, those of 4-bit weights before packing."""
    return sum(count(parameter) for parameter in model.parameters())


def backbone_elements(model: nn.Module) -> int:
    """The same without the adapter."""
    return sum(count(p) for p in backbone_parameters(model))


def backbone_parameters(model: nn.Module) -> list[Tensor]:
    """The weights that were loaded: the frozen ones beside an adapter, else all."""
    whole = not isinstance(model, PeftModel)
    named = model.named_parameters()
    return [p for name, p in named if whole or not (p.requires_grad or ".secura_" in name)]


def _starts(model: nn.Module) -> int:
    """Bytes of what OSF started from, which its adapter holds beside what is trained."""
    return sum(b.nbytes for name, b in model.named_buffers() if "_osf_" in name and "_low_init" in name)


def count(parameter: Tensor) -> int:
    """Numbers in a parameter, in a 4-bit one before packing."""
    state = getattr(parameter, "quant_state", None)
    return int(math.prod(state.shape)) if state is not None else sharding.full_shape(parameter).numel()

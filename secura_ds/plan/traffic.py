"""Bytes that one rank receives from the others in an optimizer step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from secura_ds.adapter import secura_layers
from secura_ds.plan.disk import trained_bytes
from secura_ds.plan.parts import weight
from secura_ds.plan.settings import Zero
from secura_ds.recipe import CabrSettings, Recipe

LINK = 12.0  # GB/s: what cards without NVLink reach over PCIe 4.0 x16 in ring collectives
FP32 = 4


def per_step(recipe: Recipe, model: nn.Module, zero: Zero, ranks: int, gathered: int) -> dict[str, int]:
    """Bytes by purpose, in a ring: what is not this rank's own part.

    Args:
        gathered: bytes of weights that a forward and backward pass gathers, counted whole.
    """
    if ranks == 1 or zero.stage == 0:
        return {"gather_weights": 0, "reduce_gradients": 0, "gather_trained": 0, "fold": 0}
    passes, trained = recipe.training.gradient_accumulation_steps, trained_bytes(model)
    persistent = sum(
        w.size for n, p in model.named_parameters() if (w := weight(n, p, zero, ranks)).persistent
    )

    def foreign(size: float) -> int:
        return round(size * (ranks - 1) / ranks)

    return {
        "gather_weights": foreign(gathered * passes),
        # ZeRO-1 reduces once, at the end of the accumulation.
        "reduce_gradients": foreign(trained * (1 if zero.stage == 1 else passes)),
        "gather_trained": foreign(persistent if zero.stage == 3 else trained),
        "fold": _fold(recipe, model, zero, foreign(trained)),
    }


def _fold(recipe: Recipe, model: nn.Module, zero: Zero, factors: int) -> int:
    """M1 reduces one float a layer and, as M2, gathers A and B; spread over the steps between folds."""
    adapter = recipe.adapter
    if not isinstance(adapter, CabrSettings) or not adapter.fold_every or zero.stage != 3:
        return 0
    floats = FP32 * len(secura_layers(model)) if adapter.strategy == "M1" else 0
    return round((factors + floats) / adapter.fold_every)


def seconds(traffic: Mapping[str, int], link: float) -> float:
    """Time of a step's communication over a link of `link` GB/s, if nothing hides behind computation."""
    return sum(traffic.values()) / (link * 1e9)

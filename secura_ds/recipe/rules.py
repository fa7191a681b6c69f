"""Rules between a method and the rest of a recipe, for runs and for task sequences alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic_core import PydanticCustomError

from secura_ds.recipe.adapter import WEIGHT_USES, Adapter, CabrSettings, FullTraining
from secura_ds.recipe.base import RULE

if TYPE_CHECKING:
    from secura_ds.recipe.schema import BackboneRecipe, StageTraining


def refuse_4_bit(adapter: Adapter, backbone: BackboneRecipe | None, where: str) -> None:
    """Raise pydantic's error of a rule between sections if `adapter`, at `where`, needs more than 4 bits."""
    if backbone is None or backbone.quantization is None:
        return
    if isinstance(adapter, CabrSettings) and adapter.strategy == "M1":
        raise PydanticCustomError(
            RULE,
            '{where}.strategy is "M1", which rewrites the weights, but backbone.quantization keeps them '
            'in 4 bits, where an update smaller than a quantization step would vanish: use "M2", or '
            "quantization null",
            {"where": where},
        )
    if adapter.method in WEIGHT_USES:
        raise PydanticCustomError(
            RULE,
            '{where}.method is "{method}", which {what}, but backbone.quantization keeps the weights in '
            "4 bits: use quantization null, or another method",
            {"where": where, "method": adapter.method, "what": WEIGHT_USES[adapter.method]},
        )


def refuse_rounded_masters(
    adapter: Adapter | None, backbone: BackboneRecipe | None, training: StageTraining, where: str
) -> None:
    """As `refuse_4_bit`, if whole weights would be trained in half precision without fp32 masters."""
    if backbone is None or not isinstance(adapter, FullTraining):
        return
    if training.deepspeed is None and backbone.dtype != "float32":
        raise PydanticCustomError(
            RULE,
            '{where}.method is "full" and backbone.dtype "{dtype}", in which small updates of a weight '
            'vanish, and without DeepSpeed there are no fp32 masters: use "float32", or name a '
            "configuration in training.deepspeed",
            {"where": where, "dtype": backbone.dtype},
        )

"""The model of a recipe on the meta device: every tensor that training will hold, without a byte of it.

Built by the same classes and the same choice of layers as training builds it (`training.build_model`), so
counts and shapes hold for any family, any targets and 4-bit weights.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from peft import LoraConfig, OSFConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from secura_ds import sharding
from secura_ds.adapter import SecuraConfig
from secura_ds.adapter.corda import is_corda
from secura_ds.adapter.osf import prepare_osf
from secura_ds.backbones import choose_attention, empty_model, quantization_config, replace_linear
from secura_ds.backbones.adapter import (
    adapter_config,
    refuse_packed_training,
    refuse_unmatched,
    train_weights,
)
from secura_ds.errors import UserError
from secura_ds.recipe import FullTraining, Recipe

BLOCK = 64  # weights under one constant of bitsandbytes' 4-bit format
NESTED_BLOCK = 256  # constants under one constant of theirs, with double quantization
_CODES = {"nf4": 16, "nested": 256}  # entries of the tables of values that codes stand for


def draw(recipe: Recipe, config: PreTrainedConfig, *, sharded: bool) -> PeftModel | PreTrainedModel:
    """The model that is trained of `recipe` on the meta device.

    Args:
        config: the backbone's configuration.
        sharded: DeepSpeed (any stage) owns the parameters, so that what is trained has the backbone's dtype;
            without it that is fp32.

    Raises:
        UserError: the adapter or the attention kernel does not fit the backbone.
    """
    dtype = getattr(torch, recipe.backbone.dtype)
    kernel, _ = choose_attention(config, recipe.backbone.attention, dtype=recipe.backbone.dtype)
    # A class keeps what it is given in its configuration: the caller's stays as it is.
    model = empty_model(copy.deepcopy(config), dtype=dtype, attention=kernel)
    if recipe.backbone.quantization is not None:
        replace_linear(model, quantization_config(recipe.backbone))
    model.to("meta").requires_grad_(False)
    refuse_unmatched(model, recipe.adapter)
    with torch.device("meta"):
        if recipe.backbone.quantization is not None:
            _pack(model, dtype, nested=recipe.backbone.quantization.double_quantization)
        adapted = _with_method(model, recipe, autocast=not sharded)
    adapted.enable_input_require_grads()
    if sharded:
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return adapted.train()


def _with_method(model: PreTrainedModel, recipe: Recipe, *, autocast: bool) -> PeftModel | PreTrainedModel:
    """`model` with the recipe's adapter in it, or with the weights chosen that are trained themselves."""
    if isinstance(recipe.adapter, FullTraining):
        train_weights(model, recipe.adapter)
        return model
    wanted = adapter_config(recipe, model.config)
    assert wanted is not None
    if isinstance(wanted, SecuraConfig):
        wanted.factors_saved = True  # there is no weight to choose rows and columns from
        wanted.quantized_modules = wanted.quantized_modules or []
        wanted.smagnorm = {**wanted.smagnorm, "eps": 1e-10}
        wanted.smagnorm.pop("eps_relative", None)  # it would read the weight
    if isinstance(wanted, LoraConfig) and is_corda(wanted):
        wanted.init_lora_weights, wanted.corda_config = True, None  # nor one to take a part out of
    try:
        adapted = get_peft_model(model, wanted, autocast_adapter_dtype=autocast)
    except ValueError as error:
        raise UserError(f"adapter.target_modules: {' '.join(str(error).split())}") from error
    refuse_packed_training(adapted)
    if isinstance(wanted, OSFConfig):
        prepare_osf(adapted)
    return adapted


def _pack(model: PreTrainedModel, dtype: torch.dtype, *, nested: bool) -> None:
    """Give every 4-bit parameter its packed shape and its constants."""
    for module in model.modules():
        if sharding.is_quantized(module):
            _pack_layer(module, dtype, nested=nested)


def _pack_layer(module: Any, dtype: torch.dtype, *, nested: bool) -> None:
    from bitsandbytes.functional import QuantState

    if module.bias is not None:
        module.bias.data = module.bias.data.to(dtype)  # as it is loaded
    weight = module.weight
    shape, count = weight.shape, weight.numel()
    weight.data = torch.empty(math.ceil(count / 2 / dtype.itemsize), 1, dtype=dtype)
    blocks = math.ceil(count / BLOCK)
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        shape=shape,
        code=torch.empty(_CODES["nf4"]),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
    )
    if nested:
        state.offset = torch.empty(())
        state.state2 = QuantState(
            absmax=torch.empty(math.ceil(blocks / NESTED_BLOCK)),
            code=torch.empty(_CODES["nested"]),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
        state.nested = True
    weight.quant_state, weight.bnb_quantized, module.quant_state = state, True, state


def constants(parameter: Tensor) -> list[Tensor]:
    """The constants of a 4-bit parameter, which ZeRO-3 does not cut; of any other none."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    found = [state.absmax, state.code]
    return [*found, state.offset, state.state2.absmax, state.state2.code] if state.nested else found


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of the model's repeated layers.

    Raises:
        UserError: it has none.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    ]
    if not lists:
        raise UserError("backbone.model has no list of layers: the plan cannot follow its forward pass")
    return max(lists, key=lambda item: len(item[1]))

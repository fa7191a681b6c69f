"""The model of a recipe on the meta device: every tensor that training will hold, without a byte of it.

Built by the same classes and the same choice of layers as training builds it (`training.build_model`), so
counts and shapes hold for any family, any targets and 4-bit weights.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from secura_ds.adapter import SecuraConfig
from secura_ds.backbones import choose_attention
from secura_ds.backbones.adapter import adapter_config
from secura_ds.errors import UserError
from secura_ds.recipe import Recipe

BLOCK = 64  # weights under one constant of bitsandbytes' 4-bit format
NESTED_BLOCK = 256  # constants under one constant of theirs, with double quantization
_CODES = {"nf4": 16, "nested": 256}  # entries of the tables of values that codes stand for


def draw(recipe: Recipe, config: PreTrainedConfig, *, sharded: bool) -> PeftModel:
    """The adapted model of `recipe` on the meta device.

    Args:
        config: the backbone's configuration.
        sharded: DeepSpeed (any stage) owns the parameters, so that what is trained has the backbone's dtype;
            without it that is fp32.

    Raises:
        UserError: the adapter or the attention kernel does not fit the backbone.
    """
    dtype = getattr(torch, recipe.backbone.dtype)
    kernel, _ = choose_attention(config, recipe.backbone.attention, dtype=recipe.backbone.dtype)
    with torch.device("meta"):
        # A class keeps what it is given in its configuration: the caller's stays as it is.
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=kernel
        )
        if recipe.backbone.quantization is not None:
            _quantize(model, recipe, dtype)
        model.requires_grad_(False)
        wanted = adapter_config(recipe, config)
        if isinstance(wanted, SecuraConfig):
            wanted.factors_saved = True  # there is no weight to choose rows and columns from
            wanted.quantized_modules = wanted.quantized_modules or []
            wanted.smagnorm = {**wanted.smagnorm, "eps": 1e-10}
            wanted.smagnorm.pop("eps_relative", None)  # it would read the weight
        try:
            adapted = get_peft_model(model, wanted, autocast_adapter_dtype=not sharded)
        except ValueError as error:
            raise UserError(f"adapter.target_modules: {' '.join(str(error).split())}") from error
    adapted.enable_input_require_grads()
    if sharded:
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return adapted.train()


def _quantize(model: PreTrainedModel, recipe: Recipe, dtype: torch.dtype) -> None:
    """Put 4-bit layers where transformers puts them, packed into `dtype` as `backbones.load_model` asks."""
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    quantization = recipe.backbone.quantization
    assert quantization is not None
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    replace_with_bnb_linear(model, get_keys_to_not_convert(model), settings)
    model.is_loaded_in_4bit = True  # PEFT's LoRA looks at it
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if type(weight).__name__ == "Params4bit":
            _pack(module, weight, dtype, quantization.double_quantization)


def _pack(module: nn.Module, weight: Any, dtype: torch.dtype, nested: bool) -> None:
    """Give a 4-bit parameter its packed shape and its constants."""
    from bitsandbytes.functional import QuantState

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

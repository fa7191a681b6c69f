"""From a recipe to the model that is trained: backbone, calibration, adapter."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import set_seed

from secura_ds import sharding
from secura_ds.adapter import SecuraConfig, secura_layers
from secura_ds.adapter.corda import start_tensors
from secura_ds.adapter.loading import TOLERANCE, fingerprint_error
from secura_ds.backbones import load_model, load_tokenizer
from secura_ds.errors import UserError
from secura_ds.recipe import Recipe
from secura_ds.training.method import OnCalibration, put_method
from secura_ds.training.shared import SharedCalibration

logger = logging.getLogger(__name__)


def build_model(
    recipe: Recipe,
    *,
    device: torch.device | None = None,
    sharded: bool = False,
    on_calibration: OnCalibration | None = None,
    factors: Mapping[str, Tensor] | None = None,
    examples: Sequence[Mapping[str, Any]] | None = None,
    earlier: Sequence[Mapping[str, Any]] | None = None,
    shared: SharedCalibration | None = None,
) -> tuple[PeftModel | PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the backbone, calibrate it if the recipe says so, and put the recipe's method onto it.

    Under ZeRO-3 the `SFTConfig` with the DeepSpeed configuration must be alive, so that weights are
    partitioned while they load. Collective there.

    Args:
        device: where a model that is not sharded goes; None leaves it on the CPU.
        sharded: DeepSpeed (any stage) will own the parameters, which then must all have one dtype.
        on_calibration: is given what calibration made or found, on every rank, if the recipe calls for one.
        factors: frozen buffers of an earlier run (`frozen_factors`), instead of choosing them anew.
        examples: what is to be learnt, for a calibration that looks at it.
        earlier: what was learnt before and is to be kept, the same.
        shared: where other runs may have left what calibration would make, and find it.

    Raises:
        UserError: anything in the recipe that does not fit the backbone; the message names it.
    """
    set_seed(recipe.training.seed)
    tokenizer = load_tokenizer(recipe.backbone)
    model = load_model(recipe.backbone).requires_grad_(False)
    if is_deepspeed_zero3_enabled():
        sharding.assert_partitioned(model)
    if device is not None:
        to_device(model, device)
    adapted = put_method(
        model,
        tokenizer,
        recipe,
        autocast=not sharded,
        on_calibration=on_calibration,
        factors=factors,
        examples=examples,
        earlier=earlier,
        shared=shared,
    )
    if factors is not None:
        load_factors(adapted, factors)
        _refuse_other_weights(adapted, recipe.backbone.model)
    if sharded:
        _one_dtype(adapted, getattr(torch, recipe.backbone.dtype))
    return adapted, tokenizer


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def secura_config(model: nn.Module) -> SecuraConfig | None:
    """The configuration of the model's SECURA, CABR-LoRA or CURLoRA adapter; None of any other method."""
    config = model.peft_config["default"] if isinstance(model, PeftModel) else None
    return config if isinstance(config, SecuraConfig) else None


def frozen_factors(model: nn.Module) -> dict[str, Tensor]:
    """What is chosen once and never changes in a run: C, R and indices of SECURA layers, CorDA's starts."""
    chosen = {name: buffer for name, buffer in _buffers(model).items() if ".secura_U." not in name}
    return chosen | start_tensors(model)


def accumulators(model: nn.Module) -> dict[str, Tensor]:
    """U of every SECURA layer: what folds have added up, (r, r) fp32."""
    return {name: buffer for name, buffer in _buffers(model).items() if ".secura_U." in name}


def load_factors(model: nn.Module, factors: Mapping[str, Tensor]) -> None:
    """Fill the buffers that `frozen_factors` named.

    Raises:
        UserError: the factors belong to another adapter.
    """
    own = frozen_factors(model)
    wrong = [
        n for n in {**own, **factors} if n not in own or n not in factors or own[n].shape != factors[n].shape
    ]
    if wrong:
        raise UserError(
            f"the checkpoint's factors do not fit this adapter, the first is {wrong[0]}: use --overwrite"
        )
    for name, buffer in own.items():
        buffer.copy_(factors[name])


def _refuse_other_weights(model: nn.Module, backbone: str) -> None:
    """Compare columns of the weights with those that were kept: weights may have changed under their name.

    LoRA and DoRA keep nothing of the weights. Collective under ZeRO-3, one weight at a time.
    """
    for name, layer in secura_layers(model).items():
        for adapter in layer.secura_C:
            weight = sharding.dequantized(layer.get_base_layer())
            error = fingerprint_error(weight, layer.piece(adapter), layer.secura_columns[adapter])
            if not error <= TOLERANCE:
                raise UserError(
                    f"--resume: the weights of backbone.model {backbone} are not those that the run was "
                    f"started on (columns of {name} differ by {error:.3g} of their norm): use the "
                    "checkpoint or backbone.revision it was started with, or --overwrite"
                )


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for prefix, layer in secura_layers(model).items():
        own = layer.named_buffers(prefix)
        found.update((name, buffer) for name, buffer in own if ".base_layer." not in name[len(prefix) :])
    return found


def to_device(model: PreTrainedModel, device: torch.device) -> None:
    """Bring a model to `device`; of a partitioned one the buffers, as DeepSpeed places the weights."""
    if not is_deepspeed_zero3_enabled():
        if not getattr(model, "is_loaded_in_4bit", False):  # those are where they were quantized
            model.to(device)
        return
    # Plain tensors that a forward pass needs beside the weights.
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _one_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring what is trained to the backbone's dtype: DeepSpeed flattens a group's parameters into one."""
    for parameter in trainable(model).values():
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    others = {n: p.dtype for n, p in model.named_parameters() if p.dtype != dtype}
    if others:
        name, found = next(iter(others.items()))
        raise UserError(
            f"{len(others)} parameters are not {dtype}, the first is {name} ({found}): "
            "DeepSpeed needs one dtype; set backbone.dtype to the checkpoint's"
        )


def describe_adapter(model: nn.Module, recipe: Recipe) -> str:
    """One line: how many parameters are trained, of how many."""
    trained = sum(sharding.full_shape(p).numel() for p in trainable(model).values())
    everything = sum(sharding.full_shape(p).numel() for p in model.parameters())
    share = f"{trained / everything:.2%}"
    return f"{recipe.adapter.method}: {trained:,} parameters are trained, of {everything:,} ({share})"

"""From a recipe to the model that is trained: backbone, calibration, adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import set_seed

from secura_ds import sharding
from secura_ds.adapter import SecuraConfig, secura_layers
from secura_ds.adapter.loading import TOLERANCE, fingerprint_error
from secura_ds.backbones import load_model, load_tokenizer
from secura_ds.backbones.adapter import adapter_config
from secura_ds.calibration import Calibration, calibrate
from secura_ds.errors import UserError
from secura_ds.recipe import Recipe

logger = logging.getLogger(__name__)


def build_model(
    recipe: Recipe,
    *,
    device: torch.device | None = None,
    sharded: bool = False,
    on_calibration: Callable[[Calibration], object] | None = None,
    factors: Mapping[str, Tensor] | None = None,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the backbone, calibrate it if the recipe says so, and put the adapter in.

    Under ZeRO-3 the `SFTConfig` with the DeepSpeed configuration must be alive, so that weights are
    partitioned while they load. Collective there.

    Args:
        device: where a model that is not sharded goes; None leaves it on the CPU.
        sharded: DeepSpeed (any stage) will own the parameters, which then must all have one dtype.
        on_calibration: is given what calibration made, on every rank, if the recipe calls for one.
        factors: frozen buffers of an earlier run (`frozen_factors`), instead of choosing them anew.

    Raises:
        UserError: anything in the recipe that does not fit the backbone; the message names it.
    """
    set_seed(recipe.training.seed)
    tokenizer = load_tokenizer(recipe.backbone)
    model = load_model(recipe.backbone).requires_grad_(False)
    config = adapter_config(recipe, model.config)
    _refuse_head(model, config)
    if is_deepspeed_zero3_enabled():
        sharding.assert_partitioned(model)
    if device is not None:
        to_device(model, device)
    if isinstance(config, SecuraConfig):
        if factors is not None:
            config.factors_saved = True
        elif config.selection == "calibrated":
            calibration = calibrate(model, tokenizer, config)
            if on_calibration is not None:
                on_calibration(calibration)
    # The adapter's random numbers must not depend on how many calibration drew.
    set_seed(recipe.training.seed)
    adapted = _put_adapter(model, config, autocast=not sharded)
    if factors is not None:
        load_factors(adapted, factors)
        _refuse_other_weights(adapted, recipe.backbone.model)
    if sharded:
        _one_dtype(adapted, getattr(torch, recipe.backbone.dtype))
    return adapted, tokenizer


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def frozen_factors(model: PeftModel) -> dict[str, Tensor]:
    """C, R and the chosen indices of every SECURA layer: buffers that never change in a run."""
    return {name: buffer for name, buffer in _buffers(model).items() if ".secura_U." not in name}


def accumulators(model: PeftModel) -> dict[str, Tensor]:
    """U of every SECURA layer: what folds have added up, (r, r) fp32."""
    return {name: buffer for name, buffer in _buffers(model).items() if ".secura_U." in name}


def load_factors(model: PeftModel, factors: Mapping[str, Tensor]) -> None:
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


def _refuse_other_weights(model: PeftModel, backbone: str) -> None:
    """Compare C with the columns of the weights it was taken from, which may have changed under their name.

    LoRA and DoRA keep nothing of the weights. Collective under ZeRO-3, one weight at a time.
    """
    for name, layer in secura_layers(model).items():
        for adapter in layer.secura_C:
            weight = sharding.dequantized(layer.get_base_layer())
            error = fingerprint_error(weight, layer.secura_C[adapter], layer.secura_columns[adapter])
            if not error <= TOLERANCE:
                raise UserError(
                    f"--resume: the weights of backbone.model {backbone} are not those that the run was "
                    f"started on ({name} differs from its factor C by {error:.3g} of its norm): use the "
                    "checkpoint or backbone.revision it was started with, or --overwrite"
                )


def _buffers(model: PeftModel) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for prefix, layer in secura_layers(model).items():
        own = layer.named_buffers(prefix)
        found.update((name, buffer) for name, buffer in own if ".base_layer." not in name[len(prefix) :])
    return found


def _refuse_head(model: PreTrainedModel, config: PeftConfig) -> None:
    """The loss is formed from the head's own weight, so an adapter on the head would never be trained."""
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    if check_target_module_exists(config, name):
        raise UserError(
            f"adapter.target_modules puts an adapter on the head {name}, which training would not reach: "
            f'leave it out, or train the whole head with adapter.modules_to_save=["{name}"]'
        )


def _put_adapter(model: PreTrainedModel, config: PeftConfig, *, autocast: bool) -> PeftModel:
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=autocast)
    except ValueError as error:
        # PEFT's own refusals (no target module matches, an unsupported one) are ValueErrors of several lines.
        raise UserError(f"adapter.target_modules: {' '.join(str(error).split())}") from error
    adapted.enable_input_require_grads()
    return adapted


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


def _one_dtype(model: PeftModel, dtype: torch.dtype) -> None:
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


def describe_adapter(model: PeftModel, recipe: Recipe) -> str:
    """One line: how many parameters are trained, of how many."""
    trained = sum(sharding.full_shape(p).numel() for p in trainable(model).values())
    everything = sum(sharding.full_shape(p).numel() for p in model.parameters())
    share = f"{trained / everything:.2%}"
    return f"{recipe.adapter.method}: {trained:,} parameters are trained, of {everything:,} ({share})"

"""Saving an adapter whole, also where ZeRO-3 holds it in slices."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from secura_ds.adapter.corda import config_on_original, is_corda, on_original, starts_of
from secura_ds.adapter.osf import NOT_SAVED
from secura_ds.environment import is_main_process
from secura_ds.files import atomic_write_text, save_tensors
from secura_ds.sharding import is_quantized, whole

# Key in the header of the weights file under which LoRA and DoRA carry their `quantization_record`.
QUANTIZATION_KEY = "secura_ds.quantization"


def adapter_state(
    model: PeftModel, adapter_name: str = "default", *, main_only: bool = False
) -> dict[str, Tensor]:
    """The whole adapter on the CPU, under the keys of PEFT's weights file (`base_model.model....secura_A`).

    Takes PEFT's own methods (LoRA, DoRA, OSF), too, whose saving is empty where ZeRO-3 holds slices, and
    CorDA as LoRA on the original weights.
    Gathers one tensor at a time and moves only adapter bytes. Collective: every rank calls it.

    Args:
        main_only: other ranks only take part and get an empty dictionary.
    """
    keep = is_main_process() or not main_only
    folded = getattr(model.peft_config[adapter_name], "folded", False)
    state: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        for name, parameter in module.named_parameters(prefix):
            base = ".base_layer." in name[len(prefix) :]
            if not base or (folded and name == f"{prefix}.base_layer.weight"):
                state[name] = whole(parameter, keep=keep)
        state.update((n, b.detach().to("cpu", copy=True)) for n, b in _buffers(module, prefix))
    if not keep:
        return {}
    found = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=adapter_name, save_embedding_layers=False
    )
    return on_original(found, starts_of(model))


def _buffers(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in module.named_buffers(prefix):
        own = name[len(prefix) :]
        if ".base_layer." not in own and not any(part in own for part in NOT_SAVED):
            yield name, buffer


def save_adapter(model: PeftModel, folder: Path, adapter_name: str = "default") -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, which `PeftModel.from_pretrained` loads.

    Every rank calls it; the main process writes, after the last collective. The weights file is written
    under another name, reopened and checked, then renamed.

    Raises:
        UserError: the disk is full, or a tensor is empty.
    """
    state = adapter_state(model, adapter_name, main_only=True)
    if is_main_process():
        save_tensors(Path(folder) / SAFETENSORS_WEIGHTS_NAME, state, _metadata(model, adapter_name))
        atomic_write_text(Path(folder) / CONFIG_NAME, _config_text(model, adapter_name))


def quantization_record(model: nn.Module) -> dict[str, Any]:
    """What a merge on disk must know of a base model in 4 bits; empty for any other.

    `base_quantization` is the model's quantization_config, JSON-able; `quantized_modules` names every layer
    in 4 bits, adapted or not.
    """
    modules = [name.replace(".base_layer", "") for name, m in model.named_modules() if is_quantized(m)]
    if not modules:
        return {}
    given: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    settings = given.to_dict() if hasattr(given, "to_dict") else given
    settings = {k: _json(v) for k, v in (settings or {"quant_method": "bitsandbytes"}).items()}
    return {"base_quantization": settings, "quantized_modules": modules}


def _json(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _metadata(model: PeftModel, adapter_name: str) -> dict[str, str]:
    # PEFT warns of keys in adapter_config.json that its own configs do not have; the header is free.
    if hasattr(model.peft_config[adapter_name], "base_quantization"):
        return {}
    record = quantization_record(model.get_base_model())
    return {QUANTIZATION_KEY: json.dumps(record)} if record else {}


def _config_text(model: PeftModel, adapter_name: str) -> str:
    config: Any = model.peft_config[adapter_name]
    base = model.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    saved = replace(config_on_original(config) if is_corda(config) else config, inference_mode=True)
    for key, value in vars(saved).items():
        if isinstance(value, set):  # whose order PEFT would leave to chance
            setattr(saved, key, sorted(value))
    with tempfile.TemporaryDirectory() as folder:
        saved.save_pretrained(folder, auto_mapping_dict=None if config.task_type else mapping)
        return (Path(folder) / CONFIG_NAME).read_text(encoding="utf-8")

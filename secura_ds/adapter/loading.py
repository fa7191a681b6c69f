"""Checks and extra weights when a saved adapter is loaded onto a base model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from secura_ds import sharding
from secura_ds.adapter.config import SecuraConfig
from secura_ds.adapter.layer import Linear
from secura_ds.errors import UserError, shown
from secura_ds.reading import read_json_object

# What follows a module's name in the name of an adapter's tensor; of a module saved whole, its own tensor.
_IN_ADAPTER = re.compile(r"\.(?:secura_|lora_|_?osf_).*|(?:\.base_layer)?\.[^.]+$")

# Relative error of C against W[:, columns]. Casting to bf16 costs 0.002; another base costs above 1.
TOLERANCE = 0.01
# 4-bit rounding is large for columns of small norm; unrelated weights still stand out.
TOLERANCE_REQUANTIZED = 0.9


def fingerprint_error(weight: Tensor, piece: Tensor, columns: Tensor) -> float:
    """||W[:, columns] - piece|| / ||piece||: how far W (out, in) is from the one the adapter was made on.

    Args:
        piece: the adapter's columns of W, (out, n): C, or a sample; of `columns` the first n.
    """
    expected = piece.to(weight.device, torch.float32)
    found = weight[:, columns[: piece.shape[1]].to(weight.device)].float()
    norm, error = torch.linalg.vector_norm(expected), torch.linalg.vector_norm(found - expected)
    if norm == 0:
        return 0.0 if error == 0 else float("inf")
    return float(error / norm)


def refuse_foreign_base(
    layers: Mapping[str, Linear], config: SecuraConfig, state_dict: Mapping[str, Tensor]
) -> None:
    """Compare the saved C of each layer with the columns of the base weight it was taken from.

    Raises:
        UserError: the adapter was made on another base model.
    """
    for name, layer in layers.items():
        C, columns = _saved(state_dict, name, "C"), _saved(state_dict, name, "columns")
        piece = _saved(state_dict, name, "sample") if config.contrasts else C
        if C is None or columns is None or piece is None:
            raise UserError(
                f"the adapter holds no factors for {name}: it is incomplete or made for another model"
            )
        base = layer.get_base_layer()
        if base.weight.device.type == "meta":
            continue
        if len(C) != base.out_features or int(columns.max()) >= base.in_features:
            raise UserError(
                _message(name, f"C is {tuple(C.shape)}, the layer {base.out_features, base.in_features}")
            )
        quantized_alike = sharding.is_quantized(base) == bool(config.base_quantization)
        tolerance = TOLERANCE if quantized_alike else TOLERANCE_REQUANTIZED
        error = fingerprint_error(sharding.dequantized(base), piece, columns)
        if not error <= tolerance:
            part = "columns" if config.contrasts else "factor C"
            raise UserError(
                _message(name, f"its weight differs from the adapter's {part} by {error:.3g} of its norm")
            )


def _message(layer_name: str, reason: str) -> str:
    return (
        f"the adapter does not belong to this base model: {layer_name}: {reason}; "
        "use the base (and revision) named in adapter_config.json"
    )


def load_folded_weights(
    layers: Mapping[str, Linear], config: SecuraConfig, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Copy base weights that M1 has changed into the base layers; returns the state without them.

    Raises:
        UserError: the adapter was folded by M1 but its weights are missing, or the base is 4-bit.
    """
    for name, layer in layers.items() if config.folded else ():
        weight = _saved(state_dict, name, "W")
        if weight is None:
            raise UserError(
                f"the adapter was folded by M1, but holds no weight for {name}: the file is incomplete"
            )
        sharding.set_parameter(layer.get_base_layer().weight, weight)
        layer.forget()
    return {key: value for key, value in state_dict.items() if not key.endswith(".secura_W")}


def _saved(state_dict: Mapping[str, Tensor], layer_name: str, part: str) -> Tensor | None:
    key = f"{layer_name}.secura_{part}"
    found = state_dict.get(f"base_model.model.{key}")
    return state_dict.get(key) if found is None else found


def _refuse_absent_modules(model: PreTrainedModel, folder: Path) -> None:
    """Refuse tensors of modules that the model lacks, which PEFT passes over."""
    modules = {name for name, _ in model.named_modules()}
    with safe_open(str(folder / SAFETENSORS_WEIGHTS_NAME), framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            name = key.removeprefix("base_model.model.")
            if _IN_ADAPTER.sub("", name) not in modules:
                raise UserError(
                    f"the adapter {folder} holds {shown(name)}, which {model.config.name_or_path} has no "
                    "place for: it was made for another base model, give that one"
                )


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter saved in `folder`, of any PEFT method, onto `model`.

    Raises:
        UserError: there are no safetensors, the file is damaged, or the adapter was made for another model.
    """
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise UserError(
            f"the adapter {folder} has no {SAFETENSORS_WEIGHTS_NAME}; other kinds of files can run code when "
            "they are read: save it with save_pretrained"
        )
    path = folder / CONFIG_NAME
    if read_json_object(path, remedy="copy the adapter again").get("megatron_config"):
        raise UserError(f"{path} has megatron_config, which makes PEFT import a module by name: remove it")
    try:
        _refuse_absent_modules(model, folder)
        return PeftModel.from_pretrained(model, str(folder))
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        # A truncated file; another model's shapes; settings that PEFT does not know.
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the adapter {folder} does not load on {model.config.name_or_path} ({reason}): "
            "copy it again, or give the recipe it was trained with"
        ) from error

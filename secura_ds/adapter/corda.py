"""CorDA's start: LoRA takes a part s B0 A0 of each weight over and trains it from there (arXiv 2406.05223).

PEFT subtracts that part from the base weight, so what it saves belongs to weights that nobody has. Here A0
and B0 are kept, on the CPU: W - s B0 A0 + s B A is LoRA of twice the rank on the original weight, with the
factors [B, -B0] and [A; A0], and that is what is saved. It loads and merges like any LoRA.

Shapes: A (r, in), B (out, r).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.corda import CordaEigens
from torch import Tensor, nn

from secura_ds.adapter.config import by_layer
from secura_ds.errors import UserError

_PREFIX = "base_model.model."


class Start(NamedTuple):
    """A0 and B0 of one layer, fp32 on the CPU."""

    A: Tensor
    B: Tensor


def is_corda(config: PeftConfig | None) -> bool:
    """Whether an adapter starts as CorDA does."""
    return isinstance(config, LoraConfig) and config.init_lora_weights == "corda"


def scaling(config: LoraConfig, layer_name: str) -> float:
    """alpha / rank of one layer."""
    alpha = by_layer(config.alpha_pattern, layer_name, config.lora_alpha)
    return float(alpha / by_layer(config.rank_pattern, layer_name, config.r))


def offer_starts(model: nn.Module, config: LoraConfig, starts: Mapping[str, Start]) -> None:
    """Leave the starts where PEFT looks for them when it creates the adapter, which takes them to the bit.

    PEFT makes A0 and B0 of singular values and vectors; with values of `scaling` it divides and multiplies by
    exactly 1.
    """
    for name, start in starts.items():
        module = model.get_submodule(name)
        device = module.weight.device
        values = torch.full((len(start.A),), scaling(config, name), device=device)
        module.eigens = CordaEigens(values, start.B.to(device), start.A.T.to(device))


def keep_starts(model: nn.Module, starts: Mapping[str, Start]) -> None:
    """Note every layer's start, and begin at it exactly: PEFT has rounded it to the weight's dtype."""
    layers = dict(_layers(model))
    for name, start in starts.items():
        layer: Any = layers[name]
        layer.corda_start = start
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(start.A)
            layer.lora_B["default"].weight.copy_(start.B)


def starts_of(model: nn.Module) -> dict[str, Start]:
    """The start of every layer that has one, by its name in the base model."""
    layers = ((name, getattr(layer, "corda_start", None)) for name, layer in _layers(model))
    return {name: start for name, start in layers if start is not None}


def start_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The same as tensors by name, for a checkpoint."""
    return {
        f"{name}.corda_{part}": tensor
        for name, start in starts_of(model).items()
        for part, tensor in start._asdict().items()
    }


def read_starts(tensors: Mapping[str, Tensor]) -> dict[str, Start]:
    """What `start_tensors` gave.

    Raises:
        UserError: a part is missing.
    """
    names = [key.removesuffix(".corda_A") for key in tensors if key.endswith(".corda_A")]
    missing = [name for name in names if f"{name}.corda_B" not in tensors]
    if missing or not names:
        raise UserError("the checkpoint's factors do not fit a CorDA adapter: use --overwrite")
    return {name: Start(tensors[f"{name}.corda_A"], tensors[f"{name}.corda_B"]) for name in names}


def on_original(state: Mapping[str, Tensor], starts: Mapping[str, Start]) -> dict[str, Tensor]:
    """An adapter's tensors, under the keys of PEFT's weights file, as LoRA on the original weights."""
    result = dict(state)
    for name, start in starts.items():
        A, B = (f"{_PREFIX}{name}.lora_{part}.weight" for part in "AB")
        # In fp32, as what is subtracted from the base weight was.
        result[A] = torch.cat([state[A].float(), start.A])
        result[B] = torch.cat([state[B].float(), -start.B], dim=1)
    return result


def config_on_original(config: LoraConfig) -> LoraConfig:
    """The configuration that belongs to `on_original`: twice the rank, the same scaling, a plain start."""
    return replace(
        config,
        r=2 * config.r,
        lora_alpha=2 * config.lora_alpha,
        rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={name: 2 * alpha for name, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
        corda_config=None,
    )


def _layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix(_PREFIX), module

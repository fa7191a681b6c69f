"""From a recipe's adapter to the PEFT configuration for one backbone, or to the weights that are trained."""

from __future__ import annotations

import difflib
import json
from typing import Any

from peft import LoraConfig, OSFConfig, PeftConfig, PeftModel
from peft.tuners.lora.config import CordaConfig
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from secura_ds import sharding
from secura_ds.adapter import SecuraConfig
from secura_ds.backbones.family import check_targets
from secura_ds.calibration import linear_targets
from secura_ds.errors import UserError, shown
from secura_ds.recipe import (
    WEIGHT_USES,
    Adapter,
    CabrSettings,
    CordaAdapter,
    CurLoraAdapter,
    FullTraining,
    LoraAdapter,
    OsfAdapter,
    Recipe,
    SecuraAdapter,
)


def adapter_config(recipe: Recipe, config: PreTrainedConfig) -> PeftConfig | None:
    """The PEFT configuration of the recipe's adapter, with the family's default targets; None without one."""
    adapter = recipe.adapter
    if isinstance(adapter, FullTraining):
        return None
    targets = check_targets(config, adapter)
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": targets}
    if isinstance(adapter, OsfAdapter):
        return OSFConfig(effective_rank=adapter.effective_rank, **common)
    common |= {"exclude_modules": adapter.exclude_modules, "modules_to_save": adapter.modules_to_save}
    if isinstance(adapter, LoraAdapter | CordaAdapter):
        return _lora(adapter, common)
    if isinstance(adapter, CurLoraAdapter):
        return _cur_lora(adapter, recipe.training.seed, common)
    return _cabr(adapter, recipe, common)


def _lora(adapter: LoraAdapter | CordaAdapter, common: dict[str, Any]) -> LoraConfig:
    if isinstance(adapter, CordaAdapter):
        start = {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method=adapter.mode)}
    else:
        start = {"use_dora": adapter.method == "dora"}
    return LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, **start, **common
    )


def _cur_lora(adapter: CurLoraAdapter, seed: int, common: dict[str, Any]) -> SecuraConfig:
    """CURLoRA is CABR-LoRA whose A is the frozen identity, so that B is its U."""
    return SecuraConfig(
        cur_rank=adapter.cur_rank,
        inner_rank=adapter.cur_rank,
        scaling=adapter.scaling,
        selection="sampled",
        init="identity",
        smagnorm={"apply": "never"},
        seed=seed,
        rank_pattern=adapter.rank_pattern,
        inner_rank_pattern=adapter.rank_pattern,
        **common,
    )


def _cabr(adapter: CabrSettings, recipe: Recipe, common: dict[str, Any]) -> SecuraConfig:
    calibration = adapter.calibration.model_dump()
    if calibration["text"] is not None:
        calibration["text"] = str(recipe.resolve_path(calibration["text"]))
    smagnorm: dict[str, Any] = {"apply": "never"}
    if isinstance(adapter, SecuraAdapter):
        smagnorm = adapter.smagnorm.model_dump(exclude_none=True)
    return SecuraConfig(
        cur_rank=adapter.cur_rank,
        inner_rank=adapter.inner_rank,
        scaling=adapter.scaling,
        selection=adapter.selection,
        init=adapter.init,
        strategy=adapter.strategy,
        fold_every=adapter.fold_every,
        smagnorm=smagnorm,
        calibration=calibration,
        seed=recipe.training.seed,
        rank_pattern=adapter.rank_pattern,
        inner_rank_pattern=adapter.inner_rank_pattern,
        **common,
    )


def train_weights(model: PreTrainedModel, adapter: FullTraining) -> None:
    """Let the weights that the recipe names be trained, and no others.

    Raises:
        UserError: a target that is not linear, or none.
    """
    model.requires_grad_(adapter.target_modules is None)
    if adapter.target_modules is None:
        return
    # Carries the names for PEFT's own matching; no adapter is made of it.
    targets = check_targets(model.config, adapter)
    names = LoraConfig(target_modules=targets, exclude_modules=adapter.exclude_modules)
    for layer in linear_targets(model, names).values():
        layer.requires_grad_(True)


def refuse_unmatched(model: nn.Module, adapter: Adapter) -> None:
    """Refuse a name that matches no module, which PEFT passes over: not what was meant would be trained.

    Args:
        model: the backbone, without an adapter.

    Raises:
        UserError: names the setting, and the nearest modules.
    """
    modules = [name for name, _ in model.named_modules() if name]
    for key in ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "inner_rank_pattern"):
        value = getattr(adapter, key, None)
        for entry in value if isinstance(value, list | dict) else ():
            if not any(_matches(key, entry, name) for name in modules):
                near = difflib.get_close_matches(entry, {name.rpartition(".")[2] for name in modules}, n=3)
                hint = f"; did you mean {' or '.join(near)}?" if near else ""
                raise UserError(
                    f"adapter.{key} has {shown(json.dumps(entry))}, which matches no module of the "
                    f"backbone{hint}"
                )


def _matches(key: str, entry: str, module: str) -> bool:
    """As PEFT compares a setting's entry with a module's name."""
    if key.endswith("pattern"):
        return bool(get_pattern_key([entry], module) == entry)
    return module.endswith(entry if key == "modules_to_save" else f".{entry}") or module == entry


def refuse_packed_training(model: nn.Module) -> None:
    """Refuse a module in 4 bits that is to be trained whole: packed bytes get no gradient.

    Raises:
        UserError: names it.
    """
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and any(
            sharding.is_quantized(inner) for inner in module.original_module.modules()
        ):
            place = name.removeprefix("base_model.model.")
            raise UserError(
                f"adapter.modules_to_save matches {place}, which is in 4 bits and cannot be trained whole: "
                "leave it out, or set backbone.quantization null"
            )


def refuse_stage(recipe: Recipe, stage: int) -> None:
    """Refuse a method that needs whole weights where ZeRO-3 shards them.

    Raises:
        UserError: says why, and what works.
    """
    adapter = recipe.adapter
    if stage == 3 and isinstance(adapter, OsfAdapter | CordaAdapter):
        raise UserError(
            f'adapter.method is "{adapter.method}", which {WEIGHT_USES[adapter.method]}, but '
            f"{recipe.training.deepspeed} shards them (ZeRO-3): use deepspeed/zero2.json, or "
            "training.deepspeed null on one device"
        )


def backbone_of(model: nn.Module) -> Any:
    """The transformers model in `model`, with or without an adapter in it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model

"""From a recipe's adapter to the PEFT configuration for one backbone."""

from __future__ import annotations

from typing import Any

from peft import CordaConfig, LoraConfig, OSFConfig, PeftConfig
from transformers import PreTrainedConfig

from secura_ds.adapter import SecuraConfig
from secura_ds.backbones.family import check_targets
from secura_ds.recipe import (
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

"""From a recipe's adapter to the PEFT configuration for one backbone."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftConfig
from transformers import PreTrainedConfig

from secura_ds.adapter import SecuraConfig
from secura_ds.backbones.family import check_targets
from secura_ds.recipe import LoraAdapter, Recipe


def adapter_config(recipe: Recipe, config: PreTrainedConfig) -> PeftConfig:
    """The PEFT configuration of the recipe's adapter, the family's default targets filled in."""
    adapter = recipe.adapter
    targets = check_targets(config, adapter)
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "target_modules": targets,
        "exclude_modules": adapter.exclude_modules,
        "modules_to_save": adapter.modules_to_save,
    }
    if isinstance(adapter, LoraAdapter):
        return LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            use_dora=adapter.method == "dora",
            **common,
        )
    calibration = adapter.calibration.model_dump()
    if calibration["text"] is not None:
        calibration["text"] = str(recipe.resolve_path(calibration["text"]))
    return SecuraConfig(
        cur_rank=adapter.cur_rank,
        inner_rank=adapter.inner_rank,
        scaling=adapter.scaling,
        selection=adapter.selection,
        init=adapter.init,
        strategy=adapter.strategy,
        fold_every=adapter.fold_every,
        smagnorm=adapter.smagnorm.model_dump(exclude_none=True),
        calibration=calibration,
        seed=recipe.training.seed,
        rank_pattern=adapter.rank_pattern,
        inner_rank_pattern=adapter.inner_rank_pattern,
        **common,
    )

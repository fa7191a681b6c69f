"""SECURA as a PEFT tuner. Importing this package registers it with PEFT."""

from __future__ import annotations

from unittest import mock

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from secura_ds.adapter.config import AdapterType, SecuraConfig
from secura_ds.adapter.fold import fold, layer_statistics, merged_weight
from secura_ds.adapter.layer import Linear, SecuraLayer
from secura_ds.adapter.loading import fingerprint_error, load_adapter
from secura_ds.adapter.model import SecuraModel, secura_layers
from secura_ds.adapter.saving import adapter_state, save_adapter

__all__ = [
    "Linear",
    "SecuraConfig",
    "SecuraLayer",
    "SecuraModel",
    "adapter_state",
    "fingerprint_error",
    "fold",
    "layer_statistics",
    "load_adapter",
    "merged_weight",
    "save_adapter",
    "secura_layers",
]


if AdapterType.SECURA not in PEFT_TYPE_TO_CONFIG_MAPPING:
    # PEFT checks the name against its enum, read at this one place, and runs its own duplicate checks.
    with mock.patch("peft.utils.peft_types.PeftType", AdapterType):
        register_peft_method(
            name="secura", config_cls=SecuraConfig, model_cls=SecuraModel, prefix=SecuraModel.prefix
        )

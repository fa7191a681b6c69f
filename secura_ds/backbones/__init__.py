"""Model families and their checkpoints: what is particular to each, and loading them."""

from secura_ds.backbones.family import (
    FAMILIES,
    HEAD_MODULES,
    Family,
    check_targets,
    choose_attention,
    choose_pad_token,
)
from secura_ds.backbones.loading import (
    checkpoint_of,
    empty_model,
    load_config,
    load_model,
    load_tokenizer,
    quantization_config,
    replace_linear,
    resolve_base,
)
from secura_ds.backbones.shipped import shipped_config, shipped_models

__all__ = [
    "FAMILIES",
    "HEAD_MODULES",
    "Family",
    "check_targets",
    "checkpoint_of",
    "choose_attention",
    "choose_pad_token",
    "empty_model",
    "load_config",
    "load_model",
    "load_tokenizer",
    "quantization_config",
    "replace_linear",
    "resolve_base",
    "shipped_config",
    "shipped_models",
]

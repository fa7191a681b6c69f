"""What is particular to a model family, and loading a backbone and its tokenizer from a recipe."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import is_flash_attn_2_available

from secura_ds.embedded import embedded_checkpoint
from secura_ds.errors import UserError
from secura_ds.recipe import BackboneRecipe, LoraAdapter, SecuraAdapter
from secura_ds.sharding import keep_exact

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """Facts of one model family that its configuration does not state."""

    targets: tuple[str, ...]
    pad_tokens: tuple[str, ...]
    """Tokens no text contains, the preferred first; for a tokenizer without pad token or padding with eos."""


FAMILIES = {
    # Llama 3.1 and later, Llama 3, SmolLM2
    "llama": Family(
        targets=("q_proj", "v_proj"),
        pad_tokens=("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<|endoftext|>"),
    ),
    "qwen2": Family(targets=("q_proj", "v_proj"), pad_tokens=("<|endoftext|>",)),
    "gemma2": Family(targets=("q_proj", "v_proj"), pad_tokens=("<pad>",)),
}
ADDED_PAD_TOKEN = "<|pad|>"
HEAD_MODULES = ("lm_head", "embed_tokens")


def checkpoint_of(backbone: BackboneRecipe) -> str:
    """Hub id or folder of a backbone; the embedded one is converted on the first call."""
    if backbone.model.startswith("embedded:"):
        return str(embedded_checkpoint(backbone.model.removeprefix("embedded:")))
    return backbone.model


def load_config(backbone: BackboneRecipe) -> PreTrainedConfig:
    """The backbone's configuration, without its weights.

    Raises:
        UserError: there is no such model, or no access to it.
    """
    source = checkpoint_of(backbone)
    try:
        return AutoConfig.from_pretrained(source, revision=backbone.revision)
    except (OSError, ValueError) as error:
        raise _cannot_load(backbone, error) from error


def load_tokenizer(backbone: BackboneRecipe) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer with its own chat template, padding right with a token that never ends a text.

    Raises:
        UserError: there is no such tokenizer, or no token is left for padding.
    """
    config = load_config(backbone)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint_of(backbone), revision=backbone.revision)
    except (OSError, ValueError) as error:
        raise _cannot_load(backbone, error) from error
    choose_pad_token(tokenizer, config)
    tokenizer.padding_side = "right"
    return tokenizer


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Give `tokenizer` a pad token that differs from its end token, without a new embedding row.

    Where pad is eos, masking the padding also masks the end of every answer, and the model never stops.

    Raises:
        UserError: no reserved token and no unused embedding row.
    """
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    family = FAMILIES.get(config.model_type)
    for token in family.pad_tokens if family else ():
        if token in vocabulary and vocabulary[token] != tokenizer.eos_token_id:
            tokenizer.pad_token = token
            return
    if len(tokenizer) >= config.vocab_size:
        raise UserError(
            f"the tokenizer of this {config.model_type} model has no token for padding besides its end token "
            f"{tokenizer.eos_token!r}: set pad_token in its tokenizer_config.json to an unused token"
        )
    tokenizer.add_special_tokens({"pad_token": ADDED_PAD_TOKEN})


def choose_attention(
    config: PreTrainedConfig, wanted: str = "auto", *, dtype: str = "bfloat16"
) -> tuple[str, str]:
    """The attention kernel for a model and why; `auto` takes flash attention, else SDPA, else eager.

    Raises:
        UserError: the kernel asked for is not installed, or the family does not allow it.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    refusals: dict[str, str] = {}
    if not getattr(model_class, "_supports_flash_attn", False):
        refusals["flash_attention_2"] = f"{config.model_type} does not support it"
    elif not is_flash_attn_2_available():
        refusals["flash_attention_2"] = "the package flash-attn or a GPU is missing"
    elif dtype == "float32":
        refusals["flash_attention_2"] = "it needs backbone.dtype bfloat16 or float16"
    if not getattr(model_class, "_supports_sdpa", False):
        refusals["sdpa"] = f"{config.model_type} does not support it"
    if wanted != "auto":
        if wanted in refusals:
            raise UserError(f'backbone.attention is "{wanted}": {refusals[wanted]}; use "auto"')
        return wanted, "as the recipe says"
    for kernel in ("flash_attention_2", "sdpa"):
        if kernel not in refusals:
            break
    else:
        kernel = "eager"
    reasons = [f"no {name}: {reason}" for name, reason in refusals.items()]
    return kernel, "; ".join(reasons) or "the fastest one"


def check_targets(config: PreTrainedConfig, adapter: SecuraAdapter | LoraAdapter) -> list[str] | str:
    """The modules an adapter goes on, the family's default filled in.

    Raises:
        UserError: an adapter on a head tied to the embeddings, or no default for this family.
    """
    targets = adapter.target_modules
    if targets is None:
        if config.model_type not in FAMILIES:
            raise UserError(
                "adapter.target_modules is null, but there is no default for the family "
                f"{config.model_type!r} (there are {', '.join(FAMILIES)}): name the modules, "
                'or use "all-linear"'
            )
        targets = list(FAMILIES[config.model_type].targets)
    named = [*(targets if isinstance(targets, list) else []), *(adapter.modules_to_save or [])]
    heads = [name for name in named if name.split(".")[-1] in HEAD_MODULES]
    if heads and config.tie_word_embeddings:
        raise UserError(
            f"adapter.target_modules or modules_to_save has {heads[0]!r}, but this {config.model_type} model "
            "shares one weight between its head and its embeddings: an adapter on one would change both, "
            "or part them when merging; leave it out"
        )
    return targets


def load_model(backbone: BackboneRecipe, *, attention: str | None = None) -> PreTrainedModel:
    """The backbone's model, on the CPU or, 4-bit, on this process's GPU.

    Where a ZeRO-3 configuration is alive, weights are partitioned while they load; 4-bit ones load whole on
    every rank, and DeepSpeed partitions them later.

    Args:
        attention: another choice than `backbone.attention`.

    Raises:
        UserError: no such model or no access, damaged or incomplete weights, or an unusable attention kernel.
    """
    config = load_config(backbone)
    kernel, reason = choose_attention(config, attention or backbone.attention, dtype=backbone.dtype)
    logger.info("attention of %s: %s (%s)", backbone.model, kernel, reason)
    dtype = getattr(torch, backbone.dtype)
    options: dict[str, Any] = {}
    if backbone.quantization is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=backbone.quantization.kind,
            bnb_4bit_use_double_quant=backbone.quantization.double_quantization,
            bnb_4bit_compute_dtype=dtype,
            # Packed bytes seen as compute-type numbers: ZeRO-3 flattens all weights of a group into one type.
            bnb_4bit_quant_storage=dtype,
        )
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            checkpoint_of(backbone),
            revision=backbone.revision,
            config=config,
            dtype=dtype,
            attn_implementation=kernel,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _cannot_load(backbone, error) from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"the checkpoint {backbone.model} lacks {len(missing)} weights, the first is {missing[0]}: "
            "it is incomplete or belongs to another architecture"
        )
    keep_exact(model)
    return model


def _cannot_load(backbone: BackboneRecipe, error: Exception) -> UserError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    revision = f" at revision {backbone.revision}" if backbone.revision else ""
    return UserError(
        f"backbone.model {backbone.model}{revision} cannot be loaded ({reason}); check the name, the network "
        "and, for a gated model, `hf auth login` and its licence page"
    )

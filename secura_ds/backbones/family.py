"""What is particular to a model family: targets, padding, attention, heads tied to the embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import is_flash_attn_2_available

from secura_ds.errors import UserError
from secura_ds.recipe import Adapter


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
    if getattr(config, "attn_logit_softcapping", None) is not None:
        refusals["sdpa"] = f"the attention scores of {config.model_type} are soft-capped, which it cannot do"
    elif not getattr(model_class, "_supports_sdpa", False):
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


def check_targets(config: PreTrainedConfig, adapter: Adapter) -> list[str] | str:
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
    named = [
        *(targets if isinstance(targets, list) else []),
        *(getattr(adapter, "modules_to_save", None) or []),
    ]
    heads = [name for name in named if name.split(".")[-1] in HEAD_MODULES]
    if heads and config.tie_word_embeddings:
        raise UserError(
            f"adapter.target_modules or modules_to_save has {heads[0]!r}, but this {config.model_type} model "
            "shares one weight between its head and its embeddings: an adapter on one would change both, "
            "or part them when merging; leave it out"
        )
    return targets

"""Loading a backbone: its configuration, its tokenizer and its weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, RevisionNotFoundError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled
from transformers.modeling_utils import set_quantized_state
from transformers.quantizers import AutoHfQuantizer

from secura_ds.backbones.family import choose_attention, choose_pad_token
from secura_ds.backbones.shipped import shipped_config
from secura_ds.checkpoint_files import StoredTensor, open_checkpoint
from secura_ds.embedded import embedded_checkpoint
from secura_ds.environment import is_main_process
from secura_ds.errors import UserError, first_line
from secura_ds.recipe import BackboneRecipe
from secura_ds.sharding import keep_exact, load_slices

logger = logging.getLogger(__name__)

_EMBEDDED = "embedded:"
_OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot"]


def checkpoint_of(backbone: BackboneRecipe) -> str:
    """Hub id or folder of a backbone; the embedded one is converted on the first call."""
    if backbone.model.startswith(_EMBEDDED):
        return str(embedded_checkpoint(backbone.model.removeprefix(_EMBEDDED)))
    return backbone.model


def resolve_base(base: str, revision: str | None = None) -> Path:
    """The folder of a base named by its path, by `embedded:<name>` or by a hub id (fetched if not cached).

    `revision` is a branch, tag or commit on the hub.

    Raises:
        UserError: it is none of these, or cannot be fetched.
    """
    if base.startswith(_EMBEDDED):
        return embedded_checkpoint(base.removeprefix(_EMBEDDED))
    if Path(base).is_dir():
        return Path(base)
    try:
        return Path(
            huggingface_hub.snapshot_download(base, revision=revision, ignore_patterns=_OTHER_WEIGHTS)
        )
    except (HFValidationError, OSError) as error:
        raise UserError(
            f"base is {base}: no such folder, and the hub does not give it ({first_line(error)}); "
            "give a checkpoint's folder, a hub id or embedded:smollm2-135m"
        ) from error


def load_config(backbone: BackboneRecipe) -> PreTrainedConfig:
    """The backbone's configuration, without its weights.

    Of a backbone that recipes are shipped for, the configuration is there without the hub, too.

    Raises:
        UserError: there is no such model, or no access to it.
    """
    source = checkpoint_of(backbone)
    shipped = shipped_config(source)
    refusal = _hub_refusal(backbone) if shipped is not None else None
    try:
        return AutoConfig.from_pretrained(
            source,
            revision=backbone.revision,
            local_files_only=refusal is not None,
            trust_remote_code=False,
        )
    except Exception as error:  # a damaged file makes the libraries raise anything
        if refusal is None:
            raise _cannot_load(backbone, error) from error
    logger.warning(
        "the hub does not give the configuration of %s (%s): going by the one shipped with secura_ds",
        backbone.model,
        refusal,
    )
    return shipped


def _hub_refusal(backbone: BackboneRecipe) -> str | None:
    """Why the hub gives no configuration now; asked once, where a download would try for minutes."""
    url = huggingface_hub.hf_hub_url(backbone.model, "config.json", revision=backbone.revision)
    try:
        huggingface_hub.get_hf_file_metadata(url)
    except (RevisionNotFoundError, EntryNotFoundError):
        return None  # reached; loading says what is wrong with the name
    except (HTTPError, OSError) as error:
        return first_line(error)
    return None


def load_tokenizer(backbone: BackboneRecipe) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer with its own chat template, padding right with a token that never ends a text.

    Raises:
        UserError: there is no such tokenizer, or no token is left for padding.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint_of(backbone), revision=backbone.revision, trust_remote_code=False
        )
    except Exception as error:  # a damaged file makes the libraries raise anything
        raise _cannot_load(backbone, error) from error
    choose_pad_token(tokenizer, load_config(backbone))
    tokenizer.padding_side = "right"
    return tokenizer


def load_model(backbone: BackboneRecipe, *, attention: str | None = None) -> PreTrainedModel:
    """The backbone's model, on the CPU or, 4-bit, on this process's GPU.

    Where a ZeRO-3 configuration is alive, weights are partitioned while they load, also 4-bit ones.

    Args:
        attention: another choice than `backbone.attention`.

    Raises:
        UserError: no such model or no access, damaged or incomplete weights, or an unusable attention kernel.
    """
    config = load_config(backbone)
    source = Path(checkpoint_of(backbone))
    if source.is_dir():
        open_checkpoint(source)
    if getattr(config, "auto_map", None):
        logger.warning(
            "%s brings code of its own (auto_map in config.json), which is not run: transformers' %s is used",
            backbone.model,
            config.model_type,
        )
    kernel, reason = choose_attention(config, attention or backbone.attention, dtype=backbone.dtype)
    logger.info("attention of %s: %s (%s)", backbone.model, kernel, reason)
    stored = _stored_tensors(backbone) if is_deepspeed_zero3_enabled() else None
    model = _load_slices(backbone, config, kernel, stored) if stored else None
    if model is None:
        model = _load_whole(backbone, config, kernel)
    keep_exact(model)
    return model


def _load_whole(backbone: BackboneRecipe, config: PreTrainedConfig, kernel: str) -> PreTrainedModel:
    """By transformers, which also partitions under ZeRO-3 unless the weights are 4-bit."""
    options = {} if backbone.quantization is None else {"quantization_config": quantization_config(backbone)}
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            checkpoint_of(backbone),
            revision=backbone.revision,
            config=config,
            dtype=getattr(torch, backbone.dtype),
            attn_implementation=kernel,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except (OSError, ValueError, TypeError, ArithmeticError, ImportError, SafetensorError) as error:
        raise _cannot_load(backbone, error) from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"the checkpoint {backbone.model} lacks {len(missing)} weights, the first is {missing[0]}: "
            "it is incomplete or belongs to another architecture"
        )
    if misshapen := sorted(key for key, *_ in loading["mismatched_keys"]):
        raise UserError(
            f"the checkpoint {backbone.model} has {len(misshapen)} weights of other shapes than its "
            f"config.json says, the first is {misshapen[0]}: copy both from one place"
        )
    return model


def _stored_tensors(backbone: BackboneRecipe) -> dict[str, StoredTensor]:
    """What a checkpoint's safetensors files hold, by name; empty where it has other files only."""
    try:
        folder = resolve_base(backbone.model, backbone.revision)
    except UserError as error:
        raise _cannot_load(backbone, error) from error
    if not any(folder.glob("*.safetensors")):
        return {}
    return open_checkpoint(folder).tensors


def _load_slices(
    backbone: BackboneRecipe, config: PreTrainedConfig, kernel: str, stored: Mapping[str, StoredTensor]
) -> PreTrainedModel | None:
    """A model of which each rank holds its slices and, meanwhile, one whole tensor.

    None if the files name their tensors otherwise than the model does: transformers knows how to convert.
    """
    model = empty_model(config, dtype=getattr(torch, backbone.dtype), attention=kernel)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if shapes != {name: stored[name].shape for name in shapes if name in stored}:
        logger.warning("%s is loaded by transformers, 4-bit weights whole on every rank", backbone.model)
        return None
    if backbone.quantization is not None:
        replace_linear(model, quantization_config(backbone))
    load_slices(model, lambda name: stored[name].read(), deepspeed_config(), _progress)
    if model.can_generate():
        with suppress(OSError):
            folder = checkpoint_of(backbone)
            model.generation_config = GenerationConfig.from_pretrained(folder, revision=backbone.revision)
    return model


def empty_model(config: PreTrainedConfig, *, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """A model whose parameters are on the meta device and whose buffers are real, in evaluation mode."""
    # Under ZeRO-3 transformers would build whole, random weights.
    with set_quantized_state(), no_init_weights(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    model.tie_weights()
    return model.eval()


def replace_linear(model: PreTrainedModel, quantization: BitsAndBytesConfig) -> None:
    """Put empty 4-bit layers in the place of an empty model's linear ones, its head excepted."""
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def quantization_config(backbone: BackboneRecipe) -> BitsAndBytesConfig:
    """What bitsandbytes and transformers are told of 4-bit weights."""
    assert backbone.quantization is not None
    dtype = getattr(torch, backbone.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=backbone.quantization.kind,
        bnb_4bit_use_double_quant=backbone.quantization.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        # Packed bytes seen as compute-type numbers: ZeRO-3 flattens all weights of a group into one type.
        bnb_4bit_quant_storage=dtype,
    )


def _progress(parameters: Iterable[Any]) -> Iterable[Any]:
    return tqdm(parameters, desc="loading", unit="tensor", disable=not is_main_process(), leave=False)


def _cannot_load(backbone: BackboneRecipe, error: Exception) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(
            f"backbone.model {backbone.model} is no architecture of transformers, but code that comes with "
            "the checkpoint, which is never run: choose a model that transformers knows"
        )
    revision = f" at revision {backbone.revision}" if backbone.revision else ""
    remedy = "check the name, the network and, for a gated model, `hf auth login` and its licence page"
    if Path(backbone.model).is_dir():
        remedy = "copy the checkpoint again, or mend its files"
    return UserError(
        f"backbone.model {backbone.model}{revision} cannot be loaded ({first_line(error)}); {remedy}"
    )

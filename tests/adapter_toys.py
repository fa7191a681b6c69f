"""Toy models with adapters, shared by the adapter and sharding tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from secura_ds.adapter import SecuraConfig, fold

VOCABULARY = 128


def toy_llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """Two layers of width 64 with grouped queries; the same weights for the same seed."""
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "initializer_range": 0.1,
    }
    return LlamaForCausalLM(LlamaConfig(**(shape | settings)))


def nf4_llama(folder: Path | str) -> LlamaForCausalLM:
    """A saved toy Llama with its linear layers in 4 bits, computing in bf16."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)


def config(**settings: Any) -> SecuraConfig:
    """Small ranks on every linear layer."""
    return SecuraConfig(**({"cur_rank": 8, "inner_rank": 12, "target_modules": "all-linear"} | settings))


def adapted(base: PreTrainedModel | None = None, **settings: Any) -> PeftModel:
    """A toy Llama with an adapter that already changes it (B is random)."""
    model = get_peft_model(base or toy_llama(), config(**settings))
    randomize(model)
    return model


def randomize(model: torch.nn.Module, seed: int = 1, adapter_name: str = "default") -> None:
    """Fill B, in the order of the model, so that the update changes the weights by a good part."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(f"secura_B.{adapter_name}"):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def tokens(batch: int = 2, length: int = 12, seed: int = 2) -> Tensor:
    """Random token ids (batch, length)."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor | None = None) -> Tensor:
    """Logits in evaluation mode; the model's mode is put back."""
    training = model.training
    result = model.eval()(tokens() if ids is None else ids).logits
    model.train(training)
    return result


def train(model: PeftModel, step: Callable[[Tensor], float], batches: Tensor, fold_every: int) -> list[float]:
    """One `step` for each batch of `batches` (steps, batch, length), with a fold every few; the losses."""
    losses = []
    for i, batch in enumerate(batches, start=1):
        losses.append(step(batch))
        if fold_every and i % fold_every == 0:
            fold(model)
    return losses

"""Backbones of true shape with random weights, and random tokens for them: speed and memory need no more."""

from __future__ import annotations

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from secura_ds import sharding
from secura_ds.backbones import (
    choose_attention,
    empty_model,
    quantization_config,
    replace_linear,
    shipped_config,
)
from secura_ds.recipe import Recipe

TOY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "head_dim": 16,
    "layer_types": None,
}


def shape_of(recipe: Recipe, *, quick: bool) -> PreTrainedConfig:
    """The backbone's true configuration, or a toy of the same family."""
    config = shipped_config(recipe.backbone.model)
    assert config is not None, recipe.backbone.model
    return type(config)(**{**config.to_dict(), **TOY}) if quick else config


def random_backbone(recipe: Recipe, config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """A model of `config` with random weights on `device`, quantized if the recipe says so."""
    dtype = getattr(torch, recipe.backbone.dtype)
    kernel, _ = choose_attention(config, recipe.backbone.attention, dtype=recipe.backbone.dtype)
    model = empty_model(config, dtype=dtype, attention=kernel)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if recipe.backbone.quantization is not None:
        replace_linear(model, quantization_config(recipe.backbone))

    def draw(name: str) -> torch.Tensor:
        value = torch.empty(shapes[name], dtype=dtype, device=device)
        return value.fill_(1.0) if value.dim() == 1 else value.normal_(0.0, 0.02)

    for _ in sharding.load_parameters(model, draw, device):
        pass
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    sharding.keep_exact(model)
    return model.requires_grad_(False)


def random_tokens(vocabulary: int, rows: int, length: int) -> Dataset:
    """Examples of random tokens, all learnt: the worst case for the loss."""
    ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * length] * rows})


def tokenizer_of() -> PreTrainedTokenizerFast:
    """A tokenizer with the pad and end tokens that the collator asks for; no text is tokenized."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")

"""Every shipped recipe at its backbone's true shapes, on the meta device: what is adapted, what is 4-bit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from family_toys import BACKBONES, RECIPES
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from secura_ds import SecuraConfig
from secura_ds.adapter import secura_layers
from secura_ds.backbones import (
    check_targets,
    choose_attention,
    empty_model,
    quantization_config,
    replace_linear,
)
from secura_ds.errors import UserError
from secura_ds.recipe import Recipe, SecuraAdapter, load_recipe

FILES = sorted(
    path
    for path in RECIPES.rglob("*.json")
    if {"backbone", "adapter"} <= json.loads(path.read_text(encoding="utf-8")).keys()
)
IDS = [str(path.relative_to(RECIPES)) for path in FILES]


@dataclass(frozen=True)
class Shape:
    """A backbone's dimensions, from its publisher's report; not from our configurations."""

    layers: int
    hidden: int
    queries: int
    keys: int
    mlp: int
    vocabulary: int
    tied: bool
    biased: bool = False
    norms: int = 2

    def linear(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers of a block, by name."""
        return {
            "self_attn.q_proj": (self.queries, self.hidden),
            "self_attn.k_proj": (self.keys, self.hidden),
            "self_attn.v_proj": (self.keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.queries),
            "mlp.gate_proj": (self.mlp, self.hidden),
            "mlp.up_proj": (self.mlp, self.hidden),
            "mlp.down_proj": (self.hidden, self.mlp),
        }

    def parameters(self) -> int:
        block = sum(rows * columns for rows, columns in self.linear().values()) + self.norms * self.hidden
        block += self.queries + 2 * self.keys if self.biased else 0
        return self.layers * block + self.hidden + (1 if self.tied else 2) * self.vocabulary * self.hidden


SHAPES = {
    "smollm2-135m": Shape(30, 576, 9 * 64, 3 * 64, 1536, 49152, tied=True),
    "qwen2-1.5b": Shape(28, 1536, 12 * 128, 2 * 128, 8960, 151936, tied=True, biased=True),
    "qwen2-7b": Shape(28, 3584, 28 * 128, 4 * 128, 18944, 152064, tied=False, biased=True),
    "gemma2-2b": Shape(26, 2304, 8 * 256, 4 * 256, 9216, 256000, tied=True, norms=4),
    "llama3-8b": Shape(32, 4096, 32 * 128, 8 * 128, 14336, 128256, tied=False),
    "llama3.1-8b": Shape(32, 4096, 32 * 128, 8 * 128, 14336, 128256, tied=False),
}


def built(path: Path) -> tuple[Recipe, PreTrainedModel]:
    """A shipped recipe and its backbone on the meta device, 4-bit layers in place."""
    recipe = load_recipe(path)
    config = BACKBONES[path.stem].config
    kernel, _ = choose_attention(config, recipe.backbone.attention)
    model = empty_model(config, dtype=torch.bfloat16, attention=kernel)
    if recipe.backbone.quantization is not None:
        replace_linear(model, quantization_config(recipe.backbone))
    return recipe, model.requires_grad_(False)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_the_backbone_has_its_published_shape(path: Path) -> None:
    recipe, model = built(path)
    shape = SHAPES[path.stem]
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters()
    expected = {
        f"model.layers.{i}.{name}": size for i in range(shape.layers) for name, size in shape.linear().items()
    }
    expected["lm_head"] = (shape.vocabulary, shape.hidden)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name: (m.out_features, m.in_features) for name, m in linear.items()} == expected
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == shape.tied
    assert type(head) is nn.Linear and isinstance(embedding, nn.Embedding)
    four_bit = {name for name, module in linear.items() if isinstance(module, bnb.nn.Linear4bit)}
    wanted = set(linear) - {"lm_head"} if recipe.backbone.quantization is not None else set()
    assert four_bit == wanted
    for name in four_bit:
        weight = linear[name].weight
        assert (weight.quant_type, weight.compress_statistics, weight.quant_storage) == (
            "nf4",
            True,
            torch.bfloat16,
        )
        assert linear[name].compute_dtype == torch.bfloat16


@pytest.mark.parametrize("targets", ["recipe", "all-linear", "default"])
@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_adapters_go_on_every_layer_that_is_meant(path: Path, targets: str) -> None:
    recipe, model = built(path)
    adapter = recipe.adapter
    assert isinstance(adapter, SecuraAdapter)
    if targets != "recipe":
        given = None if targets == "default" else targets
        adapter = adapter.model_copy(update={"target_modules": given})
    elif path.stem != "smollm2-135m":
        assert adapter.target_modules == "all-linear"
    config = SecuraConfig(
        cur_rank=adapter.cur_rank,
        inner_rank=adapter.inner_rank,
        selection=adapter.selection,
        smagnorm=adapter.smagnorm.model_dump(exclude_none=True),
        target_modules=check_targets(model.config, adapter),
        task_type="CAUSAL_LM",
    )
    shape = SHAPES[path.stem]
    adapted = get_peft_model(model, config)
    everywhere = adapter.target_modules == "all-linear"
    names = shape.linear() if everywhere else ["self_attn.q_proj", "self_attn.v_proj"]
    layers = secura_layers(adapted)
    assert set(layers) == {f"model.layers.{i}.{name}" for i in range(shape.layers) for name in names}
    r, m = adapter.cur_rank, adapter.inner_rank
    for name, layer in layers.items():
        rows, columns = shape.linear()[name.split(".", 3)[3]]
        state = {part: getattr(layer, f"secura_{part}")["default"] for part in "ABCRU"}
        assert {part: tuple(tensor.shape) for part, tensor in state.items()} == {
            "A": (r, m),
            "B": (m, r),
            "C": (rows, r),
            "R": (r, columns),
            "U": (r, r),
        }
        assert all(tensor.is_meta for tensor in state.values())
    trained = [parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad]
    frozen = [parameter.numel() for parameter in adapted.parameters() if not parameter.requires_grad]
    assert sum(trained) == shape.layers * len(names) * 2 * r * m
    assert sum(frozen) == shape.parameters()


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_lora_goes_on_the_same_layers(path: Path) -> None:
    _, model = built(path)
    shape = SHAPES[path.stem]
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    trained = [parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad]
    assert sum(trained) == shape.layers * 16 * sum(sum(size) for size in shape.linear().values())


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_tied_head_is_refused_and_an_untied_one_is_not(path: Path) -> None:
    recipe, model = built(path)
    adapter = recipe.adapter.model_copy(update={"target_modules": ["q_proj", "lm_head"]})
    if SHAPES[path.stem].tied:
        family = model.config.model_type
        with pytest.raises(
            UserError, match=f"'lm_head', but this {family} model shares one weight between its head"
        ):
            check_targets(model.config, adapter)
        return
    targets = check_targets(model.config, adapter)
    adapted = get_peft_model(model, SecuraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    head = secura_layers(adapted)["lm_head"]
    shape = SHAPES[path.stem]
    assert head.secura_C["default"].shape == (shape.vocabulary, 64)
    assert head.get_base_layer().weight is not adapted.get_input_embeddings().weight

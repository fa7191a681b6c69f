from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from secura_ds.backbones import (
    check_targets,
    choose_attention,
    choose_pad_token,
    load_model,
    load_tokenizer,
)
from secura_ds.errors import UserError
from secura_ds.recipe import BackboneRecipe, LoraAdapter, Quantization, SecuraAdapter

TOY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
}


def _tokenizer(*special: str, eos: str, pad: str | None = None) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate([*"abcdefgh", *special])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos, pad_token=pad)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TOY)).save_pretrained(tmp_path)
    _tokenizer("<eos>", "<|endoftext|>", eos="<eos>", pad="<eos>").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("config", "special", "eos", "pad", "expected"),
    [
        (
            LlamaConfig(**TOY),
            ["<e>", "<|reserved_special_token_0|>"],
            "<e>",
            None,
            "<|reserved_special_token_0|>",
        ),
        (
            LlamaConfig(**TOY),
            ["<e>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"],
            "<e>",
            "<e>",
            "<|finetune_right_pad_id|>",
        ),
        (Qwen2Config(**TOY), ["<|im_end|>", "<|endoftext|>"], "<|im_end|>", None, "<|endoftext|>"),
        (Qwen2Config(**TOY), ["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>", "<|pad|>"),
        (Gemma2Config(**TOY), ["<eos>", "<pad>"], "<eos>", "<pad>", "<pad>"),
        (GPT2Config(vocab_size=40), ["<eos>"], "<eos>", None, "<|pad|>"),
    ],
)
def test_pad_token_is_never_eos_and_has_an_embedding_row(
    config: Any, special: list[str], eos: str, pad: str | None, expected: str
) -> None:
    tokenizer = _tokenizer(*special, eos=eos, pad=pad)
    choose_pad_token(tokenizer, config)
    assert tokenizer.pad_token == expected
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.pad_token_id < config.vocab_size


def test_no_token_left_for_padding_is_an_error() -> None:
    tokenizer = _tokenizer("<eos>", eos="<eos>")
    with pytest.raises(UserError, match="no token for padding besides its end token '<eos>'"):
        choose_pad_token(tokenizer, GPT2Config(vocab_size=len(tokenizer)))


def test_attention_follows_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secura_ds.backbones.family.is_flash_attn_2_available", lambda: False)
    assert choose_attention(LlamaConfig(**TOY))[0] == "sdpa"
    kernel, reason = choose_attention(Gemma2Config(**TOY))
    assert kernel == "eager"
    assert "no sdpa: the attention scores of gemma2 are soft-capped, which it cannot do" in reason
    with pytest.raises(UserError, match='backbone.attention is "sdpa": .* soft-capped.*; use "auto"'):
        choose_attention(Gemma2Config(**TOY), "sdpa")
    with pytest.raises(ValueError, match="does not support an attention implementation"):
        # What the rule rests on: without it, this would be the user's error.
        AutoModelForCausalLM.from_config(Gemma2Config(**TOY), attn_implementation="sdpa")
    with pytest.raises(UserError, match="the package flash-attn or a GPU is missing"):
        choose_attention(LlamaConfig(**TOY), "flash_attention_2")

    monkeypatch.setattr("secura_ds.backbones.family.is_flash_attn_2_available", lambda: True)
    assert choose_attention(Gemma2Config(**TOY))[0] == "flash_attention_2"
    assert choose_attention(Qwen2Config(**TOY), dtype="float32")[0] == "sdpa"
    assert choose_attention(Qwen2Config(**TOY), "eager") == ("eager", "as the recipe says")


def test_targets_and_tied_heads() -> None:
    tied, untied = Qwen2Config(**TOY, tie_word_embeddings=True), Qwen2Config(**TOY, tie_word_embeddings=False)
    assert check_targets(tied, SecuraAdapter()) == ["q_proj", "v_proj"]
    assert check_targets(tied, LoraAdapter(method="lora", target_modules="all-linear")) == "all-linear"
    head = SecuraAdapter(target_modules=["q_proj", "lm_head"])
    assert check_targets(untied, head) == ["q_proj", "lm_head"]
    with pytest.raises(UserError, match="has 'lm_head', but this qwen2 model shares one weight"):
        check_targets(tied, head)
    with pytest.raises(UserError, match="has 'model.embed_tokens'"):
        check_targets(tied, SecuraAdapter(modules_to_save=["model.embed_tokens"]))
    with pytest.raises(UserError, match="no default for the family 'gpt2'"):
        check_targets(GPT2Config(), SecuraAdapter())


def test_load_whole_and_quantized(checkpoint: Path) -> None:
    whole = load_model(BackboneRecipe(model=str(checkpoint)))
    assert (whole.dtype, whole.config._attn_implementation) == (torch.bfloat16, "sdpa")
    quantized = load_model(
        BackboneRecipe(model=str(checkpoint), dtype="float16", quantization=Quantization()), attention="eager"
    )
    weight = quantized.model.layers[0].self_attn.q_proj.weight
    assert (weight.dtype, weight.numel()) == (torch.float16, 64 * 64 // 4)
    assert (weight.quant_state.quant_type, weight.quant_state.nested) == ("nf4", True)
    assert quantized.config._attn_implementation == "eager"


def test_load_tokenizer(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(BackboneRecipe(model=str(checkpoint)))
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == (
        "<|endoftext|>",
        "<eos>",
        "right",
    )


def test_damaged_and_incomplete_checkpoints(checkpoint: Path) -> None:
    backbone = BackboneRecipe(model=str(checkpoint))
    file = checkpoint / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    content = file.read_bytes()

    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="model.safetensors is truncated or damaged"):
        load_model(backbone)

    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights, the first is model.norm.weight"):
        load_model(backbone)

    (checkpoint / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(backbone)

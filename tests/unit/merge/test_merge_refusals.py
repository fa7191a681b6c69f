"""Inputs that are damaged or do not belong together: one line, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merge_toys import (
    INNER,
    NF4,
    RANK,
    TARGETS,
    change_adapter,
    make_base,
    make_quantized,
    make_secura,
    quick,
    weights,
)
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from secura_ds.errors import UserError


def refused(base: Path, adapter: Path, out: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        quick(base, adapter, out)
    assert "\n" not in str(caught.value)
    assert not out.exists() and not out.with_name("out.partial").exists()


@pytest.mark.parametrize("onto", ["trained", "original"])
def test_four_bit_adapter_refuses_another_base(base: Path, tmp_path: Path, onto: str) -> None:
    adapter, _, _ = make_quantized(tmp_path, base)
    other = make_base(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match=r"secura_C is not a piece of the base's weight"):
        quick(other, adapter, tmp_path / "out", onto=onto)


def test_refuses_other_weights_of_the_same_shape(adapter: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", seed=5, max_position_embeddings=77)
    refused(other, adapter, tmp_path / "out", r"q_proj\.secura_C is not a piece of the base's weight")


def test_refuses_weights_that_the_sample_is_not_of(base: Path, tmp_path: Path) -> None:
    contrast = {"selection": "calibrated", "calibration": {"mode": "contrast"}}
    adapter = make_secura(tmp_path / "adapter", base, **contrast)
    other = make_base(tmp_path / "other", seed=5)
    refused(other, adapter, tmp_path / "out", r"q_proj\.secura_sample is not a piece of the base's weight")


def test_accepts_a_wider_base_than_training_held(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.float32)
    held = {name: W.bfloat16() for name, W in weights(base).items()}
    adapter = make_secura(tmp_path / "adapter", base, held=held)
    quick(base, adapter, tmp_path / "out")
    assert weights(tmp_path / "out")[f"{TARGETS[0]}.weight"].dtype == torch.float32


def test_refuses_a_base_without_the_module(adapter: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", num_hidden_layers=1)
    refused(
        other,
        adapter,
        tmp_path / "out",
        r"changes model\.layers\.1\.self_attn\.q_proj\.weight, which .* \(toy\)",
    )


def test_refuses_a_base_of_another_width(adapter: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", hidden_size=32)
    refused(other, adapter, tmp_path / "out", r"q_proj\.secura_C is \[64, 4\], but .* need \[32, 4\]")


def test_refuses_an_incomplete_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    change_adapter(adapter, **{f"base_model.model.{TARGETS[1]}.secura_U": None})
    refused(base, adapter, tmp_path / "out", r"layers\.0\.self_attn\.v_proj lacks its part U")


def test_refuses_an_embedding_untied_in_training(base: Path, adapter: Path, tmp_path: Path) -> None:
    change_adapter(adapter, **{"base_model.model.model.embed_tokens.weight": torch.zeros(96, 64)})
    refused(base, adapter, tmp_path / "out", "to which the base ties its head")


def test_refuses_a_head_the_base_ties(base: Path, adapter: Path, tmp_path: Path) -> None:
    change_adapter(adapter, **{"base_model.model.lm_head.weight": torch.zeros(96, 64)})
    refused(base, adapter, tmp_path / "out", r"lm_head\.weight")


def test_refuses_a_weight_that_is_not_finite(base: Path, adapter: Path, tmp_path: Path) -> None:
    key = f"base_model.model.{TARGETS[0]}.secura_B"
    change_adapter(adapter, **{key: torch.full((INNER, RANK), float("nan"))})
    with pytest.raises(UserError, match=r"q_proj\.secura_B is not finite"):
        quick(base, adapter, tmp_path / "out")
    huge = {key: torch.full((INNER, RANK), 1e38), key[:-1] + "A": torch.full((RANK, INNER), 1e38)}
    change_adapter(adapter, **huge)
    with pytest.raises(UserError, match=r"q_proj\.weight is not finite after merging"):
        quick(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_damaged_files(base: Path, adapter: Path, tmp_path: Path) -> None:
    shard = sorted(base.glob("*.safetensors"))[1]
    whole, weights_file = shard.read_bytes(), adapter / "adapter_model.safetensors"
    for damage, match in (
        (whole[:-100], f"{shard.name} is truncated or damaged"),
        (whole[:20], "truncated or not a safetensors file"),
        (b"", "truncated or not a safetensors file"),
        (whole[:8] + b"!" * 50 + whole[58:], "damaged safetensors header"),
        (
            whole[:8] + whole[8:].replace(b'"shape":[', b'"shape":[3,', 1),
            "damaged safetensors header",
        ),
    ):
        shard.write_bytes(damage)
        refused(base, adapter, tmp_path / "out", match)
    shard.unlink()
    refused(base, adapter, tmp_path / "out", f"{shard.name}: no such file")
    shard.write_bytes(whole)
    weights_file.write_bytes(weights_file.read_bytes()[:-1])
    refused(base, adapter, tmp_path / "out", "adapter_model.safetensors is truncated")
    weights_file.unlink()
    refused(base, adapter, tmp_path / "out", "adapter_model.safetensors: no such file")


def test_refuses_other_kinds_of_input(base: Path, adapter: Path, tmp_path: Path) -> None:
    config = adapter / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "peft_type": "IA3"}))
    refused(base, adapter, tmp_path / "out", "peft_type is IA3")
    config.write_text("{")
    refused(base, adapter, tmp_path / "out", ": not JSON")
    config.write_text(json.dumps(settings))
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, adapter, tmp_path / "out", "holds neither model.safetensors")
    refused(tmp_path / "none", adapter, tmp_path / "out", "no such folder")
    model_config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**model_config, "quantization_config": NF4}))
    refused(base, adapter, tmp_path / "out", "is itself quantized")


def test_refuses_lora_that_changed_its_base(tmp_path: Path, base: Path) -> None:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "pissa"}))
    with pytest.raises(UserError, match="init_lora_weights='pissa' cannot be merged here"):
        quick(base, tmp_path / "adapter", tmp_path / "out")

"""Adapters on bitsandbytes NF4 layers, on the CPU."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import adapter_toys as toys
import pytest
import torch
from peft import PeftModel, get_peft_model

from secura_ds import UserError, fold, sharding
from secura_ds.adapter import layer_statistics, merged_weight, save_adapter, secura_layers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    toys.toy_llama().save_pretrained(folder)
    return folder


def adapted(folder: Path, **settings: Any) -> PeftModel:
    model = get_peft_model(toys.nf4_llama(folder), toys.config(**settings))
    toys.randomize(model)
    return model


@pytest.mark.parametrize("apply", ["merge", "forward"])
def test_trains_folds_and_reloads(checkpoint: Path, apply: str, tmp_path: Path) -> None:
    model = adapted(checkpoint, smagnorm={"apply": apply})
    loss = model(input_ids=toys.tokens(), labels=toys.tokens()).loss
    loss.backward()
    adapter = secura_layers(model)["model.layers.0.mlp.up_proj"]
    assert adapter.secura_C["default"].dtype == torch.bfloat16
    assert adapter.secura_A["default"].dtype == torch.float32
    assert float(adapter.secura_A["default"].grad.abs().max()) > 0
    before = toys.logits(model)
    fold(model)
    assert torch.equal(toys.logits(model), before)
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(toys.nf4_llama(checkpoint), tmp_path)
    assert torch.equal(toys.logits(loaded), before)


def test_config_records_what_it_was_trained_against(checkpoint: Path, tmp_path: Path) -> None:
    model = adapted(checkpoint, target_modules=["q_proj"])
    config = model.peft_config["default"]
    linear = {n for n, m in toys.toy_llama().named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(config.quantized_modules) == linear - {"lm_head"}
    assert config.base_quantization["bnb_4bit_quant_type"] == "nf4"
    save_adapter(model, tmp_path)
    # On the original weights C differs by the rounding to 4 bits, which is accepted; another base is not.
    PeftModel.from_pretrained(toys.toy_llama().bfloat16(), tmp_path)
    with pytest.raises(UserError, match="does not belong"):
        PeftModel.from_pretrained(toys.toy_llama(seed=3), tmp_path)


def test_forward_equals_the_weight_that_is_merged(checkpoint: Path) -> None:
    model = adapted(checkpoint, smagnorm={"apply": "forward"})
    adapter = secura_layers(model)["model.layers.0.mlp.up_proj"]
    base = adapter.get_base_layer()
    merged = merged_weight(
        sharding.dequantized(base),
        adapter.secura_C["default"],
        adapter.core("default").detach(),
        adapter.secura_R["default"],
        adapter.configs["default"],
    )
    assert merged.dtype == torch.bfloat16
    x = torch.randn(5, 64).bfloat16()
    expected = (x @ merged.T).float()
    for mode in (True, False):
        adapter.train(mode)
        with torch.no_grad():
            torch.testing.assert_close(adapter(x).float(), expected, rtol=0.02, atol=0.02)
    statistics = layer_statistics(model)["model.layers.0.mlp.up_proj"]
    W = sharding.dequantized(base).float()
    change = float((merged.float() - W).norm() / W.norm())
    assert statistics["relative_change"] == pytest.approx(change, rel=0.01)


def test_relative_eps_refers_to_the_dequantized_weight(checkpoint: Path) -> None:
    model = adapted(checkpoint, smagnorm={"apply": "forward", "eps_relative": 0.5})
    adapter = secura_layers(model)["model.layers.0.mlp.up_proj"]
    model.train()
    loss = model(input_ids=toys.tokens(), labels=toys.tokens()).loss
    assert torch.isfinite(loss)
    mean = float(sharding.dequantized(adapter.get_base_layer()).float().abs().mean())
    assert adapter.known_eps("default") == pytest.approx(0.5 * mean, rel=1e-5)
    known = adapter.known_eps("default")
    adapter.forget()
    layer_statistics(model)
    assert adapter.known_eps("default") == known


def test_m1_is_refused_with_reason_and_remedy(checkpoint: Path) -> None:
    with pytest.raises(UserError) as error:
        get_peft_model(toys.nf4_llama(checkpoint), toys.config(strategy="M1"))
    assert "model.layers.0.self_attn.q_proj is a 4-bit layer" in str(error.value)
    assert "would vanish" in str(error.value)
    assert "use strategy 'M2'" in str(error.value)


def test_evaluation_between_training_steps_changes_nothing(checkpoint: Path) -> None:
    model = adapted(checkpoint, target_modules=["q_proj", "v_proj"])
    linear = model.base_model.model.model.layers[1].mlp.up_proj
    before = sharding.dequantized(linear).clone()
    first = toys.logits(model)
    assert torch.equal(toys.logits(model), first)
    assert torch.equal(sharding.dequantized(linear), before)
    model.train()
    model(input_ids=toys.tokens(), labels=toys.tokens()).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and float(g.abs().max()) > 0 for g in gradients)


def test_merging_into_four_bits_warns_and_unmerging_is_exact(checkpoint: Path) -> None:
    model = adapted(checkpoint)
    linear = secura_layers(model)["model.layers.0.self_attn.q_proj"].get_base_layer()
    before, logits = sharding.dequantized(linear).clone(), toys.logits(model)
    with pytest.warns(UserWarning, match="merged into 4 bits"):
        model.merge_adapter()
    assert float((sharding.dequantized(linear) - before).abs().max()) > 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.unmerge_adapter()
    assert torch.equal(sharding.dequantized(linear), before)
    assert torch.equal(toys.logits(model), logits)

"""Folds keep the function, the factors, A and the optimizer; M1 weights travel with the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import adapter_toys as toys
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from secura_ds import UserError, fold
from secura_ds.adapter import adapter_state, layer_statistics, merged_weight, save_adapter, secura_layers


@pytest.mark.parametrize(("strategy", "tolerance"), [("M2", 0.0), ("M1", 1e-5)])
@pytest.mark.parametrize("form", ["update", "average"])
def test_fold_keeps_the_function(strategy: str, tolerance: float, form: str) -> None:
    model = toys.adapted(strategy=strategy, smagnorm={"apply": "forward", "form": form})
    before, state = toys.logits(model), adapter_state(model)
    fold(model)
    torch.testing.assert_close(toys.logits(model), before, rtol=0, atol=tolerance)
    for key, value in adapter_state(model).items():
        part = key.rsplit(".secura_", 1)[1]
        if part == "B":
            assert float(value.abs().max()) == 0
        elif part == "U" and strategy == "M2":
            name = key.removesuffix("U")
            torch.testing.assert_close(value, state[name + "A"] @ state[name + "B"])
        elif part != "W":
            assert torch.equal(value, state[key])


@pytest.mark.parametrize("strategy", ["M1", "M2"])
def test_training_goes_on_from_the_folded_point(strategy: str) -> None:
    model = toys.adapted(strategy=strategy, smagnorm={"apply": "forward"})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(12):
        loss = model(input_ids=toys.tokens(), labels=toys.tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
        fold(model)
        assert all(
            torch.equal(m, s["exp_avg"]) for m, s in zip(moments, optimizer.state.values(), strict=True)
        )
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1.0
    merged = toys.logits(model)
    torch.testing.assert_close(toys.logits(model.merge_and_unload()), merged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("apply", ["merge", "forward"])
def test_m1_weights_are_saved_and_loaded_onto_the_original_base(apply: str, tmp_path: Path) -> None:
    model = toys.adapted(strategy="M1", smagnorm={"apply": apply})
    for seed in (3, 4):
        fold(model)
        toys.randomize(model, seed=seed)
    save_adapter(model, tmp_path / "own")
    model.save_pretrained(tmp_path / "peft")
    assert json.loads((tmp_path / "own/adapter_config.json").read_text())["folded"] is True
    for folder in ("own", "peft"):
        loaded = PeftModel.from_pretrained(toys.toy_llama(), tmp_path / folder)
        assert torch.equal(toys.logits(loaded), toys.logits(model))
        with pytest.raises(UserError, match="does not belong"):
            PeftModel.from_pretrained(toys.toy_llama(seed=3), tmp_path / folder)
    path = tmp_path / "own/adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "v_proj.secura_W" not in k}, path)
    with pytest.raises(UserError, match="holds no weight for model.layers.0.self_attn.v_proj"):
        PeftModel.from_pretrained(toys.toy_llama(), tmp_path / "own")


def test_pure_merged_weight_is_what_a_layer_merges_to() -> None:
    model = toys.adapted(scaling=0.7, smagnorm={"apply": "forward", "eps_relative": 0.2})
    fold(model)
    toys.randomize(model, seed=8)
    for adapter in secura_layers(model).values():
        found = merged_weight(
            adapter.get_base_layer().weight,
            adapter.secura_C["default"],
            adapter.core("default").detach(),
            adapter.secura_R["default"],
            adapter.configs["default"],
        )
        assert torch.equal(found, adapter.merged_weight("default"))


def test_statistics() -> None:
    model = toys.adapted(smagnorm={"apply": "forward", "eps": 1e-3})
    name = "model.layers.0.mlp.gate_proj"
    found = layer_statistics(model)[name]
    adapter = secura_layers(model)[name]
    W, W_plus = adapter.get_base_layer().weight.detach(), adapter.merged_weight("default")
    core = adapter.core("default").detach()
    D = adapter.secura_C["default"] @ core @ adapter.secura_R["default"]
    L = D.abs() / (W.abs() + 1e-3)
    M = 2 - torch.sigmoid(6 * (L / L.max() - 0.5))
    assert found["ratio_max"] == pytest.approx(float(L.max()), rel=1e-4)
    assert found["limiter_mean"] == pytest.approx(float(M.mean()), rel=1e-5)
    assert found["relative_change"] == pytest.approx(float((W_plus - W).norm() / W.norm()), rel=1e-5)
    untouched = layer_statistics(toys.adapted(smagnorm={"apply": "never"}))[name]
    assert untouched["limiter_mean"] == 1.0


def test_m1_fold_reaches_the_weight_kept_for_evaluation() -> None:
    model = toys.adapted(strategy="M1", smagnorm={"apply": "forward", "eps_relative": 1.0})
    before = toys.logits(model.eval())
    fold(model)
    torch.testing.assert_close(toys.logits(model), before, rtol=0, atol=1e-5)
    toys.randomize(model, seed=7)
    assert float((toys.logits(model) - before).abs().max()) > 0.1

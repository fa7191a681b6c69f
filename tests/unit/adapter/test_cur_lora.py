"""CURLoRA as the tuner with A the frozen identity: what is trained, the update by hand, saving, folding."""

from __future__ import annotations

from pathlib import Path

import adapter_toys as toys
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from secura_ds.adapter import SecuraConfig, fold, save_adapter, secura_layers
from secura_ds.errors import UserError

CUR_LORA = {
    "cur_rank": 6,
    "inner_rank": 6,
    "selection": "sampled",
    "init": "identity",
    "smagnorm": {"apply": "never"},
}


def adapted(**settings: object) -> PeftModel:
    return get_peft_model(toys.toy_llama(), toys.config(**(CUR_LORA | settings)))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_u_alone_is_trained_and_starts_at_zero() -> None:
    model = adapted()
    parameters = trained(model)
    assert len(parameters) == 2 * 7 and all(".secura_B." in name for name in parameters)
    assert all(p.shape == (6, 6) and not p.any() for p in parameters.values())
    assert torch.equal(toys.logits(model), toys.logits(toys.toy_llama()))
    model(toys.tokens(), labels=toys.tokens()).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == set(parameters)


def test_a_stays_frozen_when_adapters_are_switched() -> None:
    model = adapted()
    before = set(trained(model))
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    model.set_requires_grad("default", True)
    assert set(trained(model)) == before


def test_the_update_by_hand() -> None:
    """W (3, 4), column 1 and row 2 of it, U = 5, s = 2: D = 2 * 5 * W[:, 1] W[2, :]."""
    linear = nn.Linear(4, 3, bias=False)
    linear.weight.data = torch.arange(1.0, 13.0).view(3, 4)
    config = SecuraConfig(**(CUR_LORA | {"cur_rank": 1, "inner_rank": 1}), scaling=2.0, target_modules=["0"])
    model = get_peft_model(nn.Sequential(linear), config)
    (layer,) = secura_layers(model).values()
    layer.secura_C["default"].copy_(torch.tensor([[2.0], [6.0], [10.0]]))
    layer.secura_R["default"].copy_(torch.tensor([[9.0, 10.0, 11.0, 12.0]]))
    with torch.no_grad():
        layer.secura_B["default"].fill_(5.0)
    expected = torch.tensor(
        [[181.0, 202.0, 223.0, 244.0], [545.0, 606.0, 667.0, 728.0], [909.0, 1010.0, 1111.0, 1212.0]]
    )
    assert torch.equal(model(torch.eye(4)), expected.T)
    assert torch.equal(layer.merged_weight("default"), expected)


@pytest.mark.parametrize("strategy", ["M1", "M2"])
def test_saved_folded_and_loaded_it_is_the_same_model(tmp_path: Path, strategy: str) -> None:
    model = adapted(strategy=strategy)
    toys.randomize(model)
    expected = toys.logits(model)
    fold(model)
    torch.testing.assert_close(toys.logits(model), expected, rtol=1e-4, atol=1e-4)
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(toys.toy_llama(), tmp_path, is_trainable=True)
    torch.testing.assert_close(toys.logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert set(trained(loaded)) == set(trained(model))
    assert all(
        torch.equal(layer.secura_A["default"], torch.eye(6)) for layer in secura_layers(loaded).values()
    )
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(toys.logits(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"inner_rank": 7}, {"rank_pattern": {"q_proj": 3}}])
def test_a_must_be_square(settings: dict[str, object]) -> None:
    with pytest.raises(UserError, match="init is 'identity', but cur_rank is 6"):
        toys.config(**(CUR_LORA | settings))

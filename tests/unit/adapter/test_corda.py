"""CorDA: the start by hand, exact whatever the dtype, and what is saved against the original weights."""

from __future__ import annotations

from typing import Any

import adapter_toys as toys
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn

from secura_ds.adapter import adapter_state
from secura_ds.adapter.corda import (
    Start,
    config_on_original,
    keep_starts,
    offer_starts,
    read_starts,
    start_tensors,
    starts_of,
)
from secura_ds.calibration import corda, corda_starts
from secura_ds.errors import UserError


def config(rank: int, targets: list[str], mode: str = "kpm", **more: Any) -> LoraConfig:
    start = CordaConfig(corda_method=mode)
    return LoraConfig(r=rank, target_modules=targets, init_lora_weights="corda", corda_config=start, **more)


class Tiny(nn.Module):
    """Embeddings (1, 0) and (0, 3), and a layer W = diag(2, 1)."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(2, 2)
        self.embed.weight.data = torch.diag(torch.tensor([1.0, 3.0]))
        self.linear = nn.Linear(2, 2, bias=False)
        self.linear.weight.data = torch.diag(torch.tensor([2.0, 1.0]))

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        result: Tensor = self.linear(self.embed(input_ids))
        return result


class Letters:
    def decode(self, row: list[int]) -> str:
        return "".join("ab"[i] for i in row)


@pytest.mark.parametrize(("mode", "expected"), [("kpm", [2.0, 0.0]), ("ipm", [0.0, 1.0])])
def test_the_start_by_hand(monkeypatch: pytest.MonkeyPatch, mode: str, expected: list[float]) -> None:
    """W S is diag(2, 9) up to a factor, so that the weight 2 is excited least, although it is the larger."""
    monkeypatch.setattr(corda, "generate", lambda *_: torch.tensor([[0, 1], [1, 0]]))
    model, wanted = Tiny(), config(1, ["linear"], mode, lora_alpha=4)
    made = corda_starts(model, Letters(), wanted, num_tokens=4, seed=0, progress=False)
    A, B = made.factors["linear"], made.outputs["linear"]
    torch.testing.assert_close(4 * B @ A, torch.diag(torch.tensor(expected)), rtol=1e-5, atol=1e-6)
    assert made.texts == ["ab", "ba"] and not hasattr(model.linear, "eigens")


def test_a_rank_too_large_is_refused() -> None:
    with pytest.raises(UserError, match=r"adapter.rank is 3, but linear is \(2, 2\): at most 2"):
        corda_starts(Tiny(), Letters(), config(3, ["linear"]), num_tokens=4, seed=0)


def started(dtype: torch.dtype) -> tuple[PeftModel, dict[str, Start]]:
    model, wanted = toys.toy_llama().to(dtype), config(4, ["v_proj"], lora_alpha=6)
    generator = torch.Generator().manual_seed(0)
    starts = {
        f"model.layers.{i}.self_attn.v_proj": Start(
            torch.randn(4, 64, generator=generator) / 9, torch.randn(32, 4, generator=generator) / 9
        )
        for i in range(2)
    }
    offer_starts(model, wanted, starts)
    adapted = get_peft_model(model, wanted)
    keep_starts(adapted, starts)
    return adapted, starts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_part_moves_from_the_weight_into_the_adapter(dtype: torch.dtype) -> None:
    model, starts = started(dtype)
    original = toys.toy_llama().to(dtype)
    for name, start in starts.items():
        before = original.get_submodule(name).weight
        layer = model.get_base_model().get_submodule(name)
        left = (before.float() - 1.5 * start.B @ start.A).to(dtype)
        assert torch.equal(layer.get_base_layer().weight, left)
        assert torch.equal(layer.lora_A["default"].weight, start.A)
        assert torch.equal(layer.lora_B["default"].weight, start.B)


def test_starts_are_read_as_they_were_written() -> None:
    model, starts = started(torch.float32)
    read = read_starts(start_tensors(model))
    assert read.keys() == starts.keys() == starts_of(model).keys()
    assert all(torch.equal(a, b) for name in starts for a, b in zip(read[name], starts[name], strict=True))
    with pytest.raises(UserError, match="do not fit a CorDA adapter"):
        read_starts({"model.layers.0.self_attn.v_proj.secura_C": torch.zeros(1)})


def test_it_is_saved_as_lora_of_twice_the_rank_that_changes_nothing_at_first() -> None:
    model, _ = started(torch.float32)
    plain = config_on_original(model.peft_config["default"])
    assert (plain.r, plain.lora_alpha, plain.init_lora_weights, plain.corda_config) == (8, 12, True, None)
    state = adapter_state(model)
    name = "base_model.model.model.layers.0.self_attn.v_proj.lora"
    A, B = state[f"{name}_A.weight"], state[f"{name}_B.weight"]
    assert A.shape == (8, 64) and B.shape == (32, 8)
    assert torch.equal(B @ A, torch.zeros(32, 64)) or (B @ A).abs().max() < 1e-6

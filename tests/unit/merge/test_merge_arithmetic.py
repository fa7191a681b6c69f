"""What is merged equals the method, PEFT, and what 4-bit training saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merge_toys import (
    SMAGNORM,
    TARGETS,
    change_adapter,
    make_base,
    make_quantized,
    make_secura,
    nf4,
    quick,
    secura_reference,
    weights,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from secura_ds.merge.quantization import Quantization


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["update", "average"])
@pytest.mark.parametrize("eps", [{"eps": 1e-10}, {"eps_relative": 1.0}])
def test_secura_equals_the_method(
    tmp_path: Path, dtype: torch.dtype, form: str, eps: dict[str, float]
) -> None:
    base = make_base(tmp_path / "base", dtype=dtype)
    adapter = make_secura(
        tmp_path / "adapter", base, smagnorm={"apply": "merge", "form": form, "steepness": 5.0, **eps}
    )
    quick(base, adapter, tmp_path / "out")
    before, after = weights(base), weights(tmp_path / "out")
    for module in TARGETS:
        W = before[f"{module}.weight"]
        expected = secura_reference(W, adapter, module, form=form, steepness=5.0, **{"eps": None, **eps})
        assert torch.equal(after[f"{module}.weight"], expected)
        assert not torch.equal(W, expected)


def test_apply_never_adds_the_whole_update(base: Path, tmp_path: Path) -> None:
    adapter = make_secura(tmp_path / "adapter", base, smagnorm={**SMAGNORM, "apply": "never"})
    quick(base, adapter, tmp_path / "out")
    tensors = load_file(adapter / "adapter_model.safetensors")
    p = {name: tensors[f"base_model.model.{TARGETS[0]}.secura_{name}"].float() for name in "ABCRU"}
    D = 2.0 * p["C"] @ (p["U"] + p["A"] @ p["B"]) @ p["R"]
    expected = weights(base)[f"{TARGETS[0]}.weight"].float() + D
    got = weights(tmp_path / "out")[f"{TARGETS[0]}.weight"].float()
    torch.testing.assert_close(got, expected, rtol=2**-8, atol=1e-6)


CONTRAST = {"selection": "calibrated", "calibration": {"mode": "contrast"}}


def test_a_c_that_is_no_piece_of_the_weight(base: Path, tmp_path: Path) -> None:
    adapter = make_secura(tmp_path / "adapter", base, **CONTRAST)
    quick(base, adapter, tmp_path / "out")
    before, after = weights(base), weights(tmp_path / "out")
    for module in TARGETS:
        expected = secura_reference(before[f"{module}.weight"], adapter, module, eps=1e-10)
        assert torch.equal(after[f"{module}.weight"], expected)
        assert not torch.equal(before[f"{module}.weight"], expected)


def test_m1_starts_from_the_folded_weight(base: Path, tmp_path: Path) -> None:
    adapter = make_secura(tmp_path / "adapter", base, strategy="M1", folded=True)
    folded = {module: weights(base)[f"{module}.weight"] * 1.5 for module in TARGETS}
    change_adapter(adapter, **{f"base_model.model.{module}.secura_W": W for module, W in folded.items()})
    quick(base, adapter, tmp_path / "out")
    after = weights(tmp_path / "out")
    for module in TARGETS:
        assert torch.equal(after[f"{module}.weight"], secura_reference(folded[module], adapter, module))


def test_modules_to_save_replace_whole_tensors(base: Path, adapter: Path, tmp_path: Path) -> None:
    norm = torch.arange(64, dtype=torch.float32)
    change_adapter(adapter, **{"base_model.model.model.norm.weight": norm})
    report = quick(base, adapter, tmp_path / "out")
    assert torch.equal(weights(tmp_path / "out")["model.norm.weight"], norm.bfloat16())
    assert report.adapted_tensors == 5


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"v_proj": 3}}]
)
def test_lora_and_dora_equal_peft(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = make_base(tmp_path / "base", dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=10, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.3
    model.save_pretrained(tmp_path / "adapter")
    quick(base, tmp_path / "adapter", tmp_path / "out")
    expected = model.merge_and_unload().state_dict()
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    assert not torch.equal(expected[f"{TARGETS[0]}.weight"], weights(base)[f"{TARGETS[0]}.weight"])


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (5, 36), (48, 40), (1100, 1000)])
def test_round_trip_equals_bitsandbytes(shape: tuple[int, int], double: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = Quantization(double, torch.bfloat16).round_trip(weight.clone())
    assert torch.equal(got, nf4(weight, double=double))


def test_onto_trained_writes_what_four_bit_training_saw(base: Path, tmp_path: Path) -> None:
    adapter, held, quantized = make_quantized(tmp_path, base)
    report = quick(base, adapter, tmp_path / "out")
    for name, tensor in weights(tmp_path / "out").items():
        module = name.removesuffix(".weight")
        expected = secura_reference(held[name], adapter, module) if module in TARGETS else held[name]
        assert torch.equal(tensor, expected), name
    assert (report.adapted_tensors, report.dequantized_tensors) == (4, len(quantized) - 4)


def test_onto_original_keeps_the_bases_weights(base: Path, tmp_path: Path) -> None:
    adapter, _, _ = make_quantized(tmp_path, base)
    report = quick(base, adapter, tmp_path / "out", onto="original")
    before, after = weights(base), weights(tmp_path / "out")
    for name in before:
        module = name.removesuffix(".weight")
        expected = secura_reference(before[name], adapter, module) if module in TARGETS else before[name]
        assert torch.equal(after[name], expected), name
    assert report.dequantized_tensors == 0

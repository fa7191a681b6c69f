from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_toys import toy_llama, toy_tokenizer
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Gemma2Config, PretrainedConfig, Qwen2Config

from secura_ds.adapter import SecuraConfig
from secura_ds.calibration import Calibration, calibrate, target_layers
from secura_ds.calibration.moments import InputGroup, input_groups, within_memory
from secura_ds.errors import UserError
from secura_ds.method import calibrated

MODES = ["null", "rows", "project", "whiten"]


def _config(mode: str = "null", **changes: Any) -> SecuraConfig:
    given: dict[str, Any] = {
        "cur_rank": 8,
        "inner_rank": 12,
        "selection": "calibrated",
        "target_modules": "all-linear",
        "calibration": {"mode": mode, "num_tokens": 400},
    }
    return SecuraConfig(**(given | changes))


def _bytes(group: InputGroup) -> int:
    return 8 * group.leader.in_features**2


def _direct_moments(model: torch.nn.Module, token_ids: Tensor) -> dict[str, Tensor]:
    """S of every linear layer from one plain forward, in float64."""
    moments: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        flat = x.double().flatten(0, 1)
        moments[name] = flat.T @ flat / len(flat)

    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: keep(name, inputs[0]))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(token_ids)
    for handle in handles:
        handle.remove()
    return moments


@pytest.fixture(scope="module", autouse=True)
def _short_sequences() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secura_ds.calibration.text.SEQUENCE_LENGTH", 40)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("text") / "calibration.jsonl"
    calibrate(toy_llama(), toy_tokenizer(), _config(), progress=False).save(path)
    yield path


@pytest.mark.parametrize("mode", MODES)
def test_factors_are_those_of_the_inputs_second_moments(mode: Any, text: Path) -> None:
    model = toy_llama()
    result = calibrate(model, toy_tokenizer(), _config(mode), text_path=text, progress=False)
    assert result.token_ids.shape == (10, 40)
    assert model.training
    moments = _direct_moments(model, result.token_ids)
    assert len(result.factors) == 14
    for name, R in result.factors.items():
        layer = model.get_submodule(name)
        assert R is layer.secura_factor
        assert R.dtype == torch.float32
        weight = layer.weight.detach().double()
        expected = calibrated.factors(weight, moments[name], 8, mode=mode).double()
        if mode == "null":
            projection, wanted = R.double().T @ R.double(), expected.T @ expected
            torch.testing.assert_close(projection, wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))
        else:
            torch.testing.assert_close(R.double(), expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_null_factors_are_hardly_excited_by_the_text(text: Path) -> None:
    model = toy_llama()
    result = calibrate(model, toy_tokenizer(), _config(), text_path=text, progress=False)
    moments = _direct_moments(model, result.token_ids)
    for name, R in result.factors.items():
        S, weight = moments[name], model.get_submodule(name).weight.detach().double()
        excited = torch.einsum("ri,ij,rj->r", R.double(), S, R.double()).mean()
        usual = torch.einsum("ri,ij,rj->r", weight, S, weight).mean()
        assert float(excited) < 0.4 * float(usual)


def test_the_model_writes_the_text_when_none_is_given(text: Path) -> None:
    model, tokenizer = toy_llama(), toy_tokenizer()
    written = calibrate(model, tokenizer, _config(), progress=False)
    read = calibrate(toy_llama(), tokenizer, _config(), text_path=text, progress=False)
    assert torch.equal(written.token_ids, read.token_ids)
    assert written.texts == read.texts == Calibration.load_texts(text)
    for name, R in written.factors.items():
        assert torch.equal(R, read.factors[name])
    as_setting = _config(calibration={"num_tokens": 400, "text": str(text)})
    assert torch.equal(calibrate(model, tokenizer, as_setting, progress=False).token_ids, read.token_ids)


def test_little_memory_gives_the_same_factors_in_more_passes(text: Path) -> None:
    model = toy_llama()
    ids = torch.zeros(1, 4, dtype=torch.int64)
    groups = input_groups(model, target_layers(model, _config()), ids)
    assert len(list(within_memory(groups, 10**9, _bytes))) == 1
    runs = list(within_memory(groups, 8 * 96**2, _bytes))
    assert [len(run) for run in runs] == [2, 1, 1, 2, 1, 1]
    once = calibrate(model, toy_tokenizer(), _config(), text_path=text, progress=False)
    often = calibrate(model, toy_tokenizer(), _config(), text_path=text, progress=False, memory_limit=1)
    for name, R in once.factors.items():
        assert torch.equal(R, often.factors[name])


def test_layers_with_one_input_share_a_moment() -> None:
    model = toy_llama()
    groups = input_groups(model, target_layers(model, _config()), torch.zeros(1, 4, dtype=torch.int64))
    short = [[name.split(".")[-1] for name in group.names] for group in groups]
    one_layer = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert short == one_layer * 2


def test_the_adapter_takes_the_factors(text: Path) -> None:
    model = toy_llama(torch.bfloat16)
    config = _config(target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 5})
    result = calibrate(model, toy_tokenizer(), config, text_path=text, progress=False)
    assert [tuple(R.shape) for R in result.factors.values()] == [(8, 64), (5, 96)] * 2
    adapted = get_peft_model(model, config)
    for name, R in result.factors.items():
        layer = adapted.base_model.model.get_submodule(name)
        assert torch.equal(layer.secura_R["default"], R.bfloat16())


def test_default_targets_and_exclusions_are_pefts() -> None:
    model = toy_llama()
    assert [n.split(".")[-1] for n in target_layers(model, _config(target_modules=None))] == [
        "q_proj",
        "v_proj",
    ] * 2
    some = target_layers(model, _config(exclude_modules=["o_proj", "gate_proj"], layers_to_transform=None))
    assert len(some) == 10


TOY_SHAPE: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


@pytest.mark.parametrize("family", [Qwen2Config(**TOY_SHAPE), Gemma2Config(**TOY_SHAPE, sliding_window=8)])
def test_other_families_write_and_are_calibrated(family: PretrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family)
    result = calibrate(model, toy_tokenizer(), _config(), progress=False)
    assert result.token_ids.shape == (10, 40)
    # The cache of the generation must agree with a plain forward: what was drawn is likely there too.
    probabilities = model.eval().requires_grad_(False)(result.token_ids).logits[:, 20:-1].softmax(-1)
    drawn = probabilities.gather(2, result.token_ids[:, 21:, None])
    assert float((probabilities * (probabilities > drawn)).sum(-1).max()) < 0.951
    moments = _direct_moments(model, result.token_ids)
    assert len(result.factors) == 14
    for name, R in result.factors.items():
        S, r = moments[name], R.double()
        energy, least = (
            torch.trace(r @ S @ r.T) / r.square().sum(1).mean(),
            torch.linalg.eigvalsh(S)[:8].sum(),
        )
        assert float(energy) == pytest.approx(float(least), rel=1e-3, abs=1e-6 * float(S.trace()))


def test_a_layer_outside_the_body_is_calibrated_too(text: Path) -> None:
    model = toy_llama()
    result = calibrate(
        model, toy_tokenizer(), _config(target_modules=["lm_head"]), text_path=text, progress=False
    )
    S = _direct_moments(model, result.token_ids)["lm_head"]
    R = result.factors["lm_head"].double()
    energy = torch.trace(R @ S @ R.T) / R.square().sum(1).mean()
    assert float(energy) == pytest.approx(float(torch.linalg.eigvalsh(S)[:8].sum()), rel=1e-3)


def test_4_bit_weights_are_calibrated_and_left_as_they_are(tmp_path: Path, text: Path) -> None:
    toy_llama().save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = calibrate(model, toy_tokenizer(), _config(), text_path=text, progress=False)
    moments = _direct_moments(model, result.token_ids)
    for name, R in result.factors.items():
        S, r = moments[name], R.double()
        energy = torch.trace(r @ S @ r.T) / r.square().sum(1).mean()
        least = torch.linalg.eigvalsh(S)[:8].sum()
        assert float(energy) == pytest.approx(float(least), rel=0.1)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_what_cannot_be_calibrated_is_named(text: Path) -> None:
    model, tokenizer = toy_llama(), toy_tokenizer()

    def refused(config: SecuraConfig, match: str) -> None:
        with pytest.raises(UserError, match=match):
            calibrate(model, tokenizer, config, text_path=text, progress=False)

    refused(_config(selection="least"), "selection is 'least', which needs no calibration")
    refused(_config(target_modules=["q_prj"]), r"q_prj.* match no module")
    refused(_config(target_modules=["mlp"]), r"target module model\.layers\.0\.mlp is a LlamaMLP")
    refused(_config(cur_rank=33), r"cur_rank is 33, but model\.layers\.0\.self_attn\.k_proj is \(32, 64\)")
    model.config.model_type = "unheard-of"
    refused(_config(target_modules=None), "model type 'unheard-of' has no default target_modules")


def test_a_layer_without_input_is_named(text: Path) -> None:
    model = toy_llama()
    torch.nn.init.zeros_(model.model.layers[1].post_attention_layernorm.weight)
    message = r"model\.layers\.1\.mlp\.(gate|down)_proj: .* the layer had no input \(and 1 more layers\)"
    with pytest.raises(UserError, match=message):
        calibrate(model, toy_tokenizer(), _config(), text_path=text, progress=False)
    torch.nn.init.constant_(model.model.layers[1].post_attention_layernorm.weight, torch.inf)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.\w+: .* not finite"):
        calibrate(model, toy_tokenizer(), _config(), text_path=text, progress=False)


def test_a_layer_that_no_forward_reaches_is_named(text: Path) -> None:
    model = toy_llama()
    model.spare = torch.nn.Linear(64, 64)
    with pytest.raises(UserError, match="spare is not reached by the model's forward"):
        calibrate(model, toy_tokenizer(), _config(), text_path=text, progress=False)

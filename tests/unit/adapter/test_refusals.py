"""What a user gets wrong is answered in one line that names the layer, the value and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapter_toys as toys
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from secura_ds import SecuraConfig, UserError
from secura_ds.adapter import load_adapter, save_adapter


def refused(settings: dict[str, Any], base: nn.Module | None = None) -> str:
    with pytest.raises(UserError) as error:
        get_peft_model(base or toys.toy_llama(), toys.config(**settings))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_rank_too_large() -> None:
    message = refused({"cur_rank": 40})
    assert "cur_rank is 40, but model.layers.0.self_attn.k_proj is (32, 64): at most 32" in message
    message = refused({"inner_rank": 100})
    assert "inner_rank is 100, but model.layers.0.self_attn.q_proj is (64, 64): at most 64" in message


def test_module_types() -> None:
    message = refused({"target_modules": ["embed_tokens"]})
    assert "model.embed_tokens is a torch.nn.modules.sparse.Embedding" in message
    message = refused({"target_modules": ["input_layernorm"]})
    assert "LlamaRMSNorm" in message
    assert "torch.nn.Linear and bitsandbytes Linear4bit" in message


def test_tied_head() -> None:
    message = refused({"target_modules": ["lm_head"]}, toys.toy_llama(tie_word_embeddings=True))
    assert "lm_head shares its weight with the input embedding" in message
    model = get_peft_model(toys.toy_llama(tie_word_embeddings=False), toys.config(target_modules=["lm_head"]))
    assert model.get_nb_trainable_parameters()[0] == 2 * 8 * 12


def test_calibration_is_missing_or_of_another_rank() -> None:
    message = refused({"selection": "calibrated"})
    assert "model.layers.0.self_attn.q_proj has no calibrated factor: call secura_ds.calibrate" in message
    base = toys.toy_llama()
    base.model.layers[0].self_attn.q_proj.secura_factor = torch.randn(9, 64)
    message = refused({"selection": "calibrated"}, base)
    assert "(9, 64), but cur_rank and the layer want (8, 64)" in message


@pytest.mark.parametrize("config", [toys.config(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])])
def test_an_adapter_of_a_deeper_model_is_not_taken_in_part(tmp_path: Path, config: PeftConfig) -> None:
    get_peft_model(toys.toy_llama(num_hidden_layers=3), config).save_pretrained(tmp_path)
    load_adapter(toys.toy_llama(num_hidden_layers=3), tmp_path)
    with pytest.raises(UserError, match=r"holds model\.layers\.2\..*, which .* has no place for"):
        load_adapter(toys.toy_llama(num_hidden_layers=2), tmp_path)


def test_an_adapter_for_each_row_is_refused() -> None:
    model = toys.adapted()
    model.add_adapter("second", toys.config())
    assert torch.equal(model(toys.tokens(), adapter_names=None).logits, model(toys.tokens()).logits)
    for call in (model, model.generate):
        with pytest.raises(UserError, match="adapter_names, an adapter for each row of a batch, is not"):
            call(input_ids=toys.tokens(), adapter_names=["default", "second"])


def test_weights_that_cannot_learn() -> None:
    base = toys.toy_llama()
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[:8] = 0
    assert "model.layers.1.mlp.up_proj: the 8 least important rows" in refused({}, base)


def test_m1_beside_another_adapter() -> None:
    model = toys.adapted(strategy="M1")
    with pytest.raises(UserError, match="\\['default', 'second'\\] would share base weights"):
        model.add_adapter("second", toys.config())
    assert list(model.peft_config) == ["default"]


def test_no_target_matches() -> None:
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(toys.toy_llama(), toys.config(target_modules=["query"]))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_adapter(toys.adapted(), tmp_path)
    return tmp_path


def load(folder: Path, base: nn.Module) -> str:
    with pytest.raises(UserError) as error:
        PeftModel.from_pretrained(base, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_adapter_of_another_base(saved: Path) -> None:
    message = load(saved, toys.toy_llama(seed=3))
    assert "does not belong to this base model: model.layers.0.self_attn.q_proj" in message
    base = toys.toy_llama()
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight.mul_(1.05)
    assert "model.layers.1.mlp.down_proj: its weight differs" in load(saved, base)


def test_same_base_in_another_dtype_is_accepted(saved: Path) -> None:
    loaded = PeftModel.from_pretrained(toys.toy_llama().bfloat16(), saved)
    assert toys.logits(loaded).dtype == torch.bfloat16


def test_incomplete_adapter(saved: Path) -> None:
    path = saved / "adapter_model.safetensors"
    state = load_file(path)
    save_file({k: v for k, v in state.items() if "layers.1.mlp.up_proj.secura_C" not in k}, path)
    assert "holds no factors for model.layers.1.mlp.up_proj" in load(saved, toys.toy_llama())


def test_empty_tensors_are_never_saved(tmp_path: Path) -> None:
    model = toys.adapted()
    adapter = model.base_model.model.model.layers[0].mlp.up_proj
    adapter.secura_B["default"] = nn.Parameter(torch.empty(0))
    with pytest.raises(UserError, match="1 adapter tensors are empty on this rank"):
        model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="are empty"):
        save_adapter(model, tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_config_needs_a_known_architecture_or_targets() -> None:
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), SecuraConfig(cur_rank=2, inner_rank=2))

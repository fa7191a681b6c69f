"""The life of an adapter on plain models: create, save, load, merge, unmerge, switch, evaluate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import adapter_toys as toys
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from secura_ds import SecuraConfig, UserError
from secura_ds.adapter import adapter_state, layer, save_adapter, secura_layers
from secura_ds.method import cabr, cur, smagnorm

APPLY = ["merge", "forward", "never"]


def smagnorm_of(apply: str) -> dict[str, dict[str, str]]:
    return {"smagnorm": {"apply": apply}}


@pytest.mark.parametrize("apply", APPLY)
def test_new_adapter_changes_nothing(apply: str) -> None:
    model = get_peft_model(toys.toy_llama(), toys.config(**smagnorm_of(apply)))
    torch.testing.assert_close(toys.logits(model), toys.logits(toys.toy_llama()), rtol=0, atol=1e-6)


def test_factors_are_the_ones_of_the_method() -> None:
    model = get_peft_model(toys.toy_llama(), toys.config(rank_pattern={"k_proj": 5}, scaling=0.5))
    layers = secura_layers(model)
    assert len(layers) == 14
    for name, adapter in layers.items():
        rank = 5 if name.endswith("k_proj") else 8
        W = adapter.get_base_layer().weight
        rows, columns = cur.least_important(W, rank)
        assert torch.equal(adapter.secura_rows["default"], rows)
        assert torch.equal(adapter.secura_C["default"], W[:, columns])
        assert torch.equal(adapter.secura_R["default"], W[rows])
        assert torch.equal(adapter.secura_A["default"], W[:rank, :12])
        assert adapter.secura_B["default"].shape == (12, rank)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.endswith(("secura_A.default", "secura_B.default")) for n in trainable)
    assert len(trainable) == 28


@pytest.mark.parametrize("apply", ["forward", "never"])
def test_merged_model_computes_the_same(apply: str) -> None:
    model = toys.adapted(**smagnorm_of(apply))
    adapted = toys.logits(model)
    assert float((adapted - toys.logits(toys.toy_llama())).abs().max()) > 0.1
    merged = model.merge_and_unload(safe_merge=True)
    assert merged.state_dict().keys() == toys.toy_llama().state_dict().keys()
    torch.testing.assert_close(toys.logits(merged), adapted, rtol=0, atol=1e-4)


def test_apply_merge_trains_the_whole_update_and_merges_the_restrained_one() -> None:
    model = toys.adapted(**smagnorm_of("merge"))
    whole = toys.adapted(**smagnorm_of("never"))
    torch.testing.assert_close(toys.logits(model), toys.logits(whole))
    restrained = toys.adapted(**smagnorm_of("forward"))
    torch.testing.assert_close(
        toys.logits(model.merge_and_unload()), toys.logits(restrained), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("relative", [False, True])
def test_merged_weight_is_the_methods(relative: bool) -> None:
    eps = {"eps_relative": 0.5} if relative else {"eps": 1e-6}
    model = toys.adapted(smagnorm={"apply": "forward"} | eps, scaling=0.3)
    adapter = secura_layers(model)["model.layers.1.mlp.down_proj"]
    W = adapter.get_base_layer().weight.detach()
    core = adapter.secura_A["default"] @ adapter.secura_B["default"]
    D = cabr.update(adapter.secura_C["default"], core.detach(), adapter.secura_R["default"], 0.3)
    expected = smagnorm.s_magnorm(W, D, eps=eps.get("eps"), eps_relative=eps.get("eps_relative"))
    torch.testing.assert_close(adapter.merged_weight("default"), expected, rtol=0, atol=1e-7)


def test_training_gradients_reach_a_and_b_in_all_modes_alike() -> None:
    gradients = {}
    for apply in APPLY:
        model = toys.adapted(**smagnorm_of(apply))
        model(input_ids=toys.tokens(), labels=toys.tokens()).loss.backward()
        adapter = secura_layers(model)["model.layers.0.mlp.up_proj"]
        gradients[apply] = adapter.secura_A["default"].grad, adapter.secura_B["default"].grad
    torch.testing.assert_close(gradients["merge"], gradients["never"])
    for a, b in zip(gradients["forward"], gradients["merge"], strict=True):
        cosine = torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        assert 0.5 < float(cosine) < 0.99999


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("apply", ["merge", "forward"])
def test_saved_adapter_loads_to_the_same_function(
    apply: str, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model = toys.adapted(**smagnorm_of(apply))
    model.save_pretrained(tmp_path / "peft")
    save_adapter(model, tmp_path / "own")
    for folder in ("peft", "own"):
        loaded = PeftModel.from_pretrained(
            toys.toy_llama(), tmp_path / folder, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert torch.equal(toys.logits(loaded), toys.logits(model))
    assert (tmp_path / "peft/adapter_config.json").read_text() == (
        tmp_path / "own/adapter_config.json"
    ).read_text()


def test_state_holds_everything_under_pefts_keys() -> None:
    state = adapter_state(toys.adapted())
    prefix = "base_model.model.model.layers.0.self_attn.k_proj.secura_"
    shapes = {k.removeprefix(prefix): tuple(v.shape) for k, v in state.items() if k.startswith(prefix)}
    assert shapes == {
        "A": (8, 12),
        "B": (12, 8),
        "C": (32, 8),
        "R": (8, 64),
        "U": (8, 8),
        "rows": (8,),
        "columns": (8,),
    }
    assert len(state) == 14 * 7


def test_loads_in_a_fresh_process(tmp_path: Path) -> None:
    toys.toy_llama().save_pretrained(tmp_path / "base")
    model = toys.adapted(**smagnorm_of("forward"))
    save_adapter(model, tmp_path / "adapter")
    torch.save(toys.logits(model), tmp_path / "logits.pt")
    script = f"""
import torch, secura_ds, sys
sys.path.insert(0, {str(Path(toys.__file__).parent)!r})
import adapter_toys as toys
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r})
assert torch.equal(toys.logits(model), torch.load({str(tmp_path / "logits.pt")!r}))
"""
    root = Path(toys.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_transformers_loads_the_adapter_without_peft_model(tmp_path: Path) -> None:
    model = toys.adapted()
    save_adapter(model, tmp_path)
    base = toys.toy_llama()
    base.load_adapter(str(tmp_path))
    assert torch.equal(toys.logits(base), toys.logits(model))


def test_modules_to_save_travel_with_the_adapter(tmp_path: Path) -> None:
    model = toys.adapted(toys.toy_llama(tie_word_embeddings=False), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(toys.toy_llama(tie_word_embeddings=False), tmp_path)
    assert torch.equal(toys.logits(loaded), toys.logits(model))


def test_unmerge_restores_every_bit_and_disabling_gives_the_base() -> None:
    model = toys.adapted(**smagnorm_of("forward"))
    base, adapted = toys.logits(toys.toy_llama()), toys.logits(model)
    weight = secura_layers(model)["model.layers.0.self_attn.q_proj"].get_base_layer().weight
    before = weight.detach().clone()
    model.merge_adapter(safe_merge=True)
    assert not torch.equal(weight, before)
    torch.testing.assert_close(toys.logits(model), adapted, rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(toys.logits(model), base)
    assert torch.equal(weight, before)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(weight, before)
    assert torch.equal(toys.logits(model), adapted)


def test_safe_merge_refuses_what_is_not_finite() -> None:
    model = toys.adapted()
    with torch.no_grad():
        secura_layers(model)["model.layers.1.mlp.up_proj"].secura_B["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj not finite"):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize("apply", ["merge", "forward"])
def test_several_adapters(apply: str) -> None:
    model = toys.adapted(**smagnorm_of(apply))
    first = toys.logits(model)
    model.add_adapter("second", toys.config(cur_rank=4, **smagnorm_of(apply)))
    toys.randomize(model, seed=5, adapter_name="second")
    assert torch.equal(toys.logits(model), first)
    model.set_adapter("second")
    second = toys.logits(model)
    assert float((second - first).abs().max()) > 0.1
    model.base_model.set_adapter(["default", "second"])
    if apply == "forward":
        with pytest.raises(UserError, match="activate one of them with set_adapter"):
            toys.logits(model)
        return
    both = toys.logits(model)
    adapter = secura_layers(model)["model.layers.0.mlp.up_proj"]
    x = torch.randn(3, 64)
    parts = {}
    for names in (["default"], ["second"], ["default", "second"]):
        adapter.set_adapter(names)
        parts[len(names), names[0]] = adapter(x) - adapter.base_layer(x)
    expected = parts[1, "default"] + parts[1, "second"]
    torch.testing.assert_close(parts[2, "default"], expected, rtol=0, atol=1e-5)
    assert float((both - first).abs().max()) > 0.1
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(toys.logits(model), first)


def test_restrained_weight_is_formed_once_for_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toys.adapted(**smagnorm_of("forward"))
    formed, form = [], layer.restrained_weight
    monkeypatch.setattr(layer, "restrained_weight", lambda *a: formed.append(1) or form(*a))
    model.eval()
    model.generate(input_ids=toys.tokens(1), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert len(formed) == 14
    model.generate(input_ids=toys.tokens(1), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert len(formed) == 14
    before = toys.logits(model)
    toys.randomize(model, seed=9)
    assert float((toys.logits(model) - before).abs().max()) > 0.1
    assert len(formed) == 28
    model.train()
    assert all(adapter._restrained is None for adapter in secura_layers(model).values())


def test_accumulator_stays_fp32_and_the_rest_follows_the_model() -> None:
    model = toys.adapted()
    adapter = next(iter(secura_layers(model).values()))
    adapter.secura_U["default"].fill_(1 + 2**-20)
    model.bfloat16()
    assert adapter.secura_U["default"].dtype == torch.float32
    assert float(adapter.secura_U["default"][0, 0]) == 1 + 2**-20
    assert adapter.secura_C["default"].dtype == torch.bfloat16
    assert adapter.secura_rows["default"].dtype == torch.int64


def test_bf16_base_gets_fp32_a_and_b_unless_told_otherwise() -> None:
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        base = toys.toy_llama().bfloat16()
        model = get_peft_model(base, toys.config(), autocast_adapter_dtype=autocast)
        adapter = next(iter(secura_layers(model).values()))
        assert adapter.secura_A["default"].dtype == adapter.secura_B["default"].dtype == dtype
        assert adapter.secura_A["default"].requires_grad
        assert adapter.secura_R["default"].dtype == torch.bfloat16
        assert toys.logits(model).dtype == torch.bfloat16


def test_trains_under_autocast() -> None:
    for apply in APPLY:
        model = toys.adapted(**smagnorm_of(apply)).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=toys.tokens(), labels=toys.tokens()).loss
        loss.backward()
        adapter = secura_layers(model)["model.layers.0.mlp.up_proj"]
        assert torch.isfinite(adapter.secura_A["default"].grad).all()


def test_any_module_with_linear_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 4))
    settings = {"cur_rank": 3, "inner_rank": 4, "target_modules": ["0", "2"], "init": "orthogonal"}
    model = get_peft_model(net, SecuraConfig(selection="sampled", smagnorm={"apply": "forward"}, **settings))
    toys.randomize(model)
    x = torch.randn(5, 10)
    y = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=0, atol=1e-5)


def test_calibrated_factor_becomes_r() -> None:
    base = toys.toy_llama()
    projection = base.model.layers[0].mlp.up_proj
    projection.secura_factor = torch.randn(8, 64)
    model = get_peft_model(base, toys.config(selection="calibrated", target_modules=["layers.0.mlp.up_proj"]))
    adapter = secura_layers(model)["model.layers.0.mlp.up_proj"]
    assert torch.equal(adapter.secura_R["default"], projection.secura_factor)
    assert torch.equal(adapter.secura_columns["default"], cur.least_important(projection.weight, 8)[1])
    assert adapter.secura_rows["default"].tolist() == [-1] * 8

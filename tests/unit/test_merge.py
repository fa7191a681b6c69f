"""The streaming merge: bytes, arithmetic, refusals, interruption."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from secura_ds.errors import UserError
from secura_ds.merge import merge
from secura_ds.merge import work as work_module
from secura_ds.merge.checkpoint import open_checkpoint
from secura_ds.merge.quantization import Quantization
from secura_ds.method import cabr, cur
from secura_ds.method.smagnorm import s_magnorm

RANK, INNER = 4, 6
SMAGNORM = {"apply": "merge", "form": "update", "steepness": 6.0, "eps": 1e-10}
NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "bfloat16",
}
TARGETS = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"]


def toy_config(**changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=True,
    )
    return LlamaConfig(**{**settings, **changes})


def make_base(folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any) -> Path:
    """A sharded toy checkpoint with the files that lie beside weights."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(toy_config(**changes)).to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        (folder / name).write_text(f"{name} of the base")
    (folder / "README.md").write_text("the base's card")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in open_checkpoint(folder).tensors.items()}


def raw(folder: Path) -> dict[str, bytes]:
    return {
        name: stored.file.read_bytes()[stored.start : stored.stop]
        for name, stored in open_checkpoint(folder).tensors.items()
    }


def make_secura(
    folder: Path, base: Path, *, held: dict[str, torch.Tensor] | None = None, **config: Any
) -> Path:
    """A SECURA adapter as it lies on disk; `held` are the weights that training saw, if not the base's."""
    held = held or weights(base)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for module in TARGETS:
        W = held[f"{module}.weight"]
        rows, columns = cur.least_important(W, RANK)
        parts = {
            "A": cabr.initial_a(W, RANK, INNER, "block"),
            "B": 0.3 * torch.randn(INNER, RANK, generator=generator),
            "C": W[:, columns],
            "R": W[rows],
            "U": 0.3 * torch.randn(RANK, RANK, generator=generator),
            "rows": rows,
            "columns": columns,
        }
        tensors |= {f"base_model.model.{module}.secura_{part}": t.contiguous() for part, t in parts.items()}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "SECURA",
        "cur_rank": RANK,
        "inner_rank": INNER,
        "scaling": 2.0,
        "smagnorm": SMAGNORM,
        "factors_saved": True,
        "base_model_name_or_path": "toy",
        "target_modules": ["q_proj", "v_proj"],
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def change_adapter(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors by their full key, with `__` for `.` left as given."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for key, value in changes.items():
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value
    save_file(tensors, path)


def secura_reference(W: torch.Tensor, adapter: Path, module: str, **settings: Any) -> torch.Tensor:
    tensors = load_file(adapter / "adapter_model.safetensors")
    part = {name: tensors[f"base_model.model.{module}.secura_{name}"] for name in "ABCRU"}
    D = cabr.update(part["C"], cabr.core(part["A"], part["B"], part["U"]), part["R"], 2.0)
    return s_magnorm(W, D, **settings)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return make_secura(tmp_path / "adapter", base)


def quick(base: Path, adapter: Path, out: Path, **options: Any) -> Any:
    return merge(base, adapter, out, **{"check": False, "progress": False, **options})


def test_untouched_tensors_and_headers_are_the_bases_bytes(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = quick(base, adapter, tmp_path / "out")
    before, after = raw(base), raw(tmp_path / "out")
    touched = {f"{module}.weight" for module in TARGETS}
    assert {name for name in before if before[name] != after[name]} == touched
    assert "lm_head.weight" not in after  # the head stays tied
    shards = sorted(base.glob("*.safetensors"))
    assert len(shards) > 3
    for shard, file in zip(shards, open_checkpoint(tmp_path / "out").files, strict=True):
        assert file.path.name == shard.name and shard.read_bytes().startswith(file.header)
    assert (report.adapted_tensors, report.untouched_tensors) == (4, len(before) - 4)
    assert report.bytes == sum(shard.stat().st_size for shard in shards)


def test_files_beside_the_weights(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "tokenizer_config.json").write_text("{}")
    (adapter / "chat_template.jinja").write_text("the adapter's template")
    quick(base, adapter, tmp_path / "out")
    out = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "LICENSE",
    ):
        assert out[name] == (base / name).read_bytes()
    assert out["chat_template.jinja"] == b"the adapter's template"
    assert not {"README.md", "merge.state.json", "adapter_config.json"} & out.keys()
    assert json.loads(out["merge.json"])["adapted_tensors"] == 4


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


def test_refuses_lora_that_changed_its_base(tmp_path: Path, base: Path) -> None:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "pissa"}))
    with pytest.raises(UserError, match="init_lora_weights='pissa' cannot be merged here"):
        quick(base, tmp_path / "adapter", tmp_path / "out")


# -- trained on 4-bit weights --------------------------------------------------------------------------------


def nf4(weight: torch.Tensor, *, double: bool = True) -> torch.Tensor:
    import bitsandbytes as bnb

    packed = bnb.nn.Params4bit(
        weight.clone(),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=double,
        quant_storage=torch.bfloat16,
    ).to("cpu")
    return bnb.functional.dequantize_4bit(packed.data, packed.quant_state)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (5, 36), (48, 40), (1100, 1000)])
def test_round_trip_equals_bitsandbytes(shape: tuple[int, int], double: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = Quantization(double, torch.bfloat16).round_trip(weight.clone())
    assert torch.equal(got, nf4(weight, double=double))


def make_quantized(tmp_path: Path, base: Path) -> tuple[Path, dict[str, torch.Tensor], list[str]]:
    quantized = [name.removesuffix(".weight") for name in weights(base) if name.endswith("proj.weight")]
    held = {name: nf4(W) if name.endswith("proj.weight") else W for name, W in weights(base).items()}
    adapter = make_secura(
        tmp_path / "adapter", base, held=held, base_quantization=NF4, quantized_modules=quantized
    )
    return adapter, held, quantized


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


@pytest.mark.parametrize("onto", ["trained", "original"])
def test_four_bit_adapter_refuses_another_base(base: Path, tmp_path: Path, onto: str) -> None:
    adapter, _, _ = make_quantized(tmp_path, base)
    other = make_base(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match=r"secura_C is not a piece of the base's weight"):
        quick(other, adapter, tmp_path / "out", onto=onto)


# -- inputs that do not belong together, or are damaged ------------------------------------------------------


def refused(base: Path, adapter: Path, out: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        quick(base, adapter, out)
    assert "\n" not in str(caught.value)
    assert not out.exists() and not out.with_name("out.partial").exists()


def test_refuses_other_weights_of_the_same_shape(adapter: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", seed=5, max_position_embeddings=77)
    refused(other, adapter, tmp_path / "out", r"q_proj\.secura_C is not a piece of the base's weight")


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
    refused(base, adapter, tmp_path / "out", "is not JSON")
    config.write_text(json.dumps(settings))
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, adapter, tmp_path / "out", "holds neither model.safetensors")
    refused(tmp_path / "none", adapter, tmp_path / "out", "no such folder")
    model_config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**model_config, "quantization_config": NF4}))
    refused(base, adapter, tmp_path / "out", "is itself quantized")


def test_out_is_never_overwritten_unasked(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "keep").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        quick(base, adapter, out)
    assert (out / "keep").read_text() == "mine"
    quick(base, adapter, out, overwrite=True)
    assert not (out / "keep").exists() and (out / "config.json").exists()
    with pytest.raises(UserError, match="which is or holds the base"):
        quick(base, adapter, base, overwrite=True)


# -- interruption --------------------------------------------------------------------------------------------


def test_an_interrupted_merge_is_finished_by_the_next(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    written: list[str] = []
    write_edited = work_module._write_edited

    def interrupted(tensor: Any, *rest: Any) -> None:
        written.append(tensor.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        write_edited(tensor, *rest)

    monkeypatch.setattr(work_module, "_write_edited", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick(base, adapter, out)
    assert not out.exists() and partial.is_dir()
    finished = {shard: shard.stat().st_mtime_ns for shard in partial.glob("*.safetensors")}
    assert len(finished) >= 2
    report = quick(base, adapter, out)
    assert len(written) == 3 + 2  # the interrupted tensor and the last one; the first two were kept
    for shard, changed in finished.items():
        assert (out / shard.name).stat().st_mtime_ns == changed
    assert report.resumed_bytes == sum((out / shard.name).stat().st_size for shard in finished)
    assert not partial.exists() and not list(out.glob("*.writing"))
    quick(base, adapter, tmp_path / "again")
    assert raw(out) == raw(tmp_path / "again")


def test_other_inputs_do_not_resume(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            work_module.WorkFolder, "copy_side_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            quick(base, adapter, tmp_path / "out")
    change_adapter(adapter, **{f"base_model.model.{TARGETS[0]}.secura_U": torch.zeros(RANK, RANK)})
    assert quick(base, adapter, tmp_path / "out").resumed_bytes == 0


def test_a_full_disk_is_one_line(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(UserError, match=r"needs? .* GB more, but the disk"):
            quick(base, adapter, tmp_path / "out")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(work_module.os, "fsync", full)
        with pytest.raises(UserError, match="is full: free some space"):
            quick(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quick(base, adapter, tmp_path / "out")


# -- the check ----------------------------------------------------------------------------------------------


def test_check_measures_the_gap_of_a_lora(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.float32)
    (base / "tokenizer.json").unlink()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "adapter")
    report = merge(base, tmp_path / "adapter", tmp_path / "out", progress=False)
    assert report.check_skipped is None
    assert report.max_logit_gap is not None and 0 <= report.max_logit_gap < 1e-5
    assert report.kl is not None and 0 <= report.kl < 1e-6
    assert isinstance(model, PeftModel)
    tokens = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits
        got = LlamaForCausalLM.from_pretrained(tmp_path / "out")(input_ids=tokens).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_check_is_strict_about_keys(base: Path, adapter: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(
        UserError, match=r"does not load strictly: 9 tensors .* the first is model\.layers\.2"
    ):
        merge(base, adapter, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_check_is_skipped_where_memory_is_short(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secura_ds.merge.check._cgroup_free", lambda: 1000)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    report = merge(base, adapter, tmp_path / "out", progress=False)
    assert report.max_logit_gap is None and report.check_skipped == "needs 0.5 GiB of free memory"


@pytest.mark.parametrize("quantized", [False, True])
def test_memory_stays_within_a_shard_and_three_tensors(tmp_path: Path, quantized: bool) -> None:
    base = make_base(tmp_path / "base", hidden_size=512, intermediate_size=8192)
    if quantized:
        adapter, _, _ = make_quantized(tmp_path, base)
    else:
        adapter = make_secura(tmp_path / "adapter", base)
    report = quick(base, adapter, tmp_path / "out")
    checkpoint = open_checkpoint(base)
    largest = max(tensor.num_bytes for tensor in checkpoint.tensors.values())
    assert largest == 2 * 512 * 8192
    assert report.peak_memory_bytes <= max(file.size for file in checkpoint.files) + 3 * largest

"""`launch/merge.py` on adapters that the tuner made: the merged model is the trained one; ends by signal."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from adapter_toys import nf4_llama
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from secura_ds import SecuraConfig, fold, save_adapter
from secura_ds.errors import run_command
from secura_ds.merge import work as work_module

ROOT = Path(__file__).resolve().parents[2]
TOKENS = torch.arange(40).view(2, 20)


@pytest.fixture(scope="module")
def command() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_merge", ROOT / "launch" / "merge.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_base(folder: Path, dtype: torch.dtype, **changes: Any) -> Path:
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    config = LlamaConfig(**{**settings, **changes})
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size="40KB")
    return folder


def train(base: Path, folder: Path, *, load: dict[str, Any] | None = None, **settings: Any) -> PeftModel:
    """A saved adapter that folded once and went on, as training leaves one."""
    model = AutoModelForCausalLM.from_pretrained(base, **{"dtype": "auto", **(load or {})})
    model = get_peft_model(
        model, SecuraConfig(**{"cur_rank": 8, "inner_rank": 12, "target_modules": "all-linear", **settings})
    )
    for _ in range(2):
        for name, parameter in model.named_parameters():
            if "secura_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if not model.peft_config["default"].folded and not bool(model_u(model).any()):
            fold(model)
    save_adapter(model, folder)
    return model.eval()


def model_u(model: PeftModel) -> torch.Tensor:
    return next(buffer for name, buffer in model.named_buffers() if "secura_U" in name)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits.float()


def run(command: ModuleType, *arguments: object) -> int:
    return run_command(command.main, [str(a) for a in arguments])


@pytest.mark.parametrize("strategy", ["M1", "M2"])
def test_merged_model_is_the_model_that_was_trained(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    run_folder = tmp_path / "run"
    model = train(base, run_folder / "adapter", strategy=strategy, smagnorm={"apply": "forward"})
    (run_folder / "recipe.resolved.json").write_text("{}")
    out = run_folder / "merged"
    assert run(command, "--base", base, "--adapter", run_folder / "adapter", "--out", out, "--quiet") == 0
    assert "max logit gap between adapter model and merged model: " in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)
    assert (logits(merged) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    expected = model.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())
    report = json.loads((run_folder / "merge.json").read_text())
    assert report == json.loads((out / "merge.json").read_text())
    assert report["max_logit_gap"] < 1e-5 and report["kl"] < 1e-6
    assert (report["adapted_tensors"], report["untouched_tensors"]) == (14, 6)


def test_in_bf16_merging_costs_no_rounding_beyond_the_forwards(command: ModuleType, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16, tie_word_embeddings=False)
    train(base, tmp_path / "adapter", smagnorm={"apply": "forward"})
    arguments = ("--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out", "--quiet")
    assert run(command, *arguments) == 0
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["max_logit_gap"] == 0


def test_after_4_bit_training_the_merge_is_what_training_saw(command: ModuleType, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    load = {"quantization_config": quantization}
    train(base, tmp_path / "adapter", load=load, smagnorm={"apply": "forward"})
    # Adapters on some layers only: the other quantized layers were seen dequantized too.
    train(base, tmp_path / "part", load=load, smagnorm={"apply": "forward"}, target_modules=["q_proj"])
    gaps, counts = {}, {}
    for adapter, onto in (
        ("adapter", "trained"),
        ("adapter", "original"),
        ("part", "trained"),
        ("part", "original"),
    ):
        out = tmp_path / f"{adapter}-{onto}"
        arguments = ("--base", base, "--adapter", tmp_path / adapter, "--out", out, "--onto", onto, "--quiet")
        assert run(command, *arguments) == 0
        report = json.loads((out / "merge.json").read_text())
        gaps[adapter, onto], counts[adapter, onto] = report["max_logit_gap"], report["dequantized_tensors"]
    assert gaps["adapter", "trained"] == 0 and gaps["part", "trained"] < 0.02
    assert gaps["adapter", "original"] > 0.05 and gaps["part", "original"] > 0.05
    assert [*counts.values()] == [0, 0, 12, 0]


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_4_bit_lora_is_merged_onto_what_training_saw(
    command: ModuleType, tmp_path: Path, use_dora: bool
) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    settings = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, "use_dora": use_dora}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword arguments")
        save_adapter(get_peft_model(nf4_llama(base), LoraConfig(**settings)), tmp_path / "adapter")
        PeftModel.from_pretrained(nf4_llama(base), tmp_path / "adapter")
    gaps = {}
    for onto in ("trained", "original"):
        out = tmp_path / onto
        arguments = ("--base", base, "--adapter", tmp_path / "adapter", "--out", out, "--onto", onto)
        assert run(command, *arguments, "--quiet") == 0
        report = json.loads((out / "merge.json").read_text())
        gaps[onto] = report["max_logit_gap"]
        assert (report["adapted_tensors"], report["dequantized_tensors"]) == (2, 12 * (onto == "trained"))
    # In bf16 the forward rounds base and update apart, the merged weight once.
    assert gaps["trained"] < gaps["original"] / 5, gaps


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_a_signal_leaves_only_the_partial_folder_and_a_rerun_finishes(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    train(base, tmp_path / "adapter")
    arguments = ("--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out", "--quiet")
    names: list[str] = []

    def interrupt_at_third(tensor: Any, *_: Any) -> None:
        names.append(tensor.name)
        write_edited(tensor, *_)
        if len(names) == 3:
            os.kill(os.getpid(), number)

    write_edited = work_module._write_edited
    with monkeypatch.context() as patch:
        patch.setattr(work_module, "_write_edited", interrupt_at_third)
        assert run(command, *arguments) == status
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out.partial"]
    assert run(command, *arguments) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["resumed_bytes"] > 0


def test_errors_are_one_line_and_exit_2(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    train(base, tmp_path / "adapter")
    make_base(tmp_path / "wide", torch.float32, hidden_size=128)
    capsys.readouterr()
    for base_argument, expected in (
        (tmp_path / "wide", "secura_C is"),
        (str(tmp_path / "no such"), "no such folder"),
        ("embedded:unknown", "unknown"),
    ):
        arguments = ("--base", base_argument, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
        assert run(command, *arguments, "--quiet") == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and error[0].startswith("error: ") and expected in error[0]
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()

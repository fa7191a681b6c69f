"""Backbones loaded in slices on two gloo ranks: the values of a whole load, in the memory of the slices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import adapter_toys as toys
import pytest
import torch
from safetensors.torch import load_file, save_file
from training_toys import free_port, quiet_environment

sys.path.insert(0, str(Path(__file__).resolve().parent))

import streaming_worker as worker  # noqa: E402

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

BACKBONES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    # No number of elements here is divisible by the number of ranks times a block of 64.
    "uneven": {"hidden_size": 96, "intermediate_size": 200, "vocab_size": 131, "num_hidden_layers": 3},
    # 72 MB in 4 bits, the largest tensor 1.5 MB.
    "large": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 48, "vocab_size": 1024},
}
CASES = [f"{name}, {kind}" for name in BACKBONES for kind in ("bf16", "nf4")]
MIB = 2**20


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two ranks has found."""
    root = tmp_path_factory.mktemp("backbones")
    for name, shape in BACKBONES.items():
        toys.toy_llama(**shape).to(torch.bfloat16).save_pretrained(root / name)
    toys.toy_llama().save_pretrained(root / "broken")
    toys.toy_llama(tie_word_embeddings=True).to(torch.bfloat16).model.save_pretrained(root / "renamed")
    tensors = load_file(root / "broken" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, root / "broken" / "model.safetensors", {"format": "pt"})
    out = root / "found.json"
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
    command += ["--master_port", str(free_port()), worker.__file__, "--out", str(out)]
    command += [
        "--broken",
        str(root / "broken"),
        "--renamed",
        str(root / "renamed"),
        "--backbones",
        *(str(root / name) for name in BACKBONES),
    ]
    run = subprocess.run(command, env=quiet_environment(), capture_output=True, text=True, timeout=560)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    ranks: list[dict[str, Any]] = json.loads(out.read_text())
    return ranks


@pytest.mark.parametrize("case", CASES)
def test_slices_hold_what_transformers_loads(found: list[dict[str, Any]], case: str) -> None:
    layers = BACKBONES[case.split(",")[0]].get("num_hidden_layers", 2)
    for rank in found:
        result = rank[case]
        assert result["equal"]
        assert result["gap"] == 0
        assert result["weights"] == 9 * layers + 3
        assert result["quantized"] == (7 * layers if case.endswith("nf4") else 0)
        assert result["tied"] == [case.startswith("tied")] * 2
        assert result["buffers"] and result["generation"] and result["name"] and result["quantization"]


@pytest.mark.parametrize("case", CASES)
def test_a_rank_keeps_its_slices_and_the_4_bit_constants(found: list[dict[str, Any]], case: str) -> None:
    """A block of 64 weights has one byte of maximum, 256 blocks four more, a layer its two code tables."""
    for rank in found:
        result = rank[case]
        constants = result["elements"] // 64 + result["elements"] // 2**12 + 2048 * result["quantized"]
        assert result["slices"] < 0.51 * result["whole"] + 4096
        assert result["slices"] <= result["held"] < result["slices"] + constants + 2**14


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_loading_never_holds_the_model(found: list[dict[str, Any]], kind: str) -> None:
    """The growth of the resident memory's peak, mapped files included."""
    for rank in found:
        result = rank[f"large, {kind}"]
        assert result["growth"] < result["held"] + 16 * MIB < result["whole"]


def test_an_incomplete_checkpoint_is_named(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "lacks 1 weights, the first is model.norm.weight" in rank["broken"]


def test_names_that_only_transformers_can_convert_still_load(found: list[dict[str, Any]]) -> None:
    assert all(rank["renamed"] for rank in found)

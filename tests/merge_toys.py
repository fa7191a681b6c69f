"""Toy checkpoints and adapters for the tests of the merge."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from secura_ds.checkpoint_files import open_checkpoint
from secura_ds.merge import MergeReport, merge
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


def make_base(
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    shard: str = "40KB",
    **changes: Any,
) -> Path:
    """A sharded toy checkpoint with the files that lie beside weights."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(toy_config(**changes)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
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
    """A SECURA adapter as it lies on disk; `held` are the weights that training saw, if not the base's.

    With calibration mode "contrast" C is no piece of the weight, and a sample of it lies beside.
    """
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
        if config.get("calibration", {}).get("mode") == "contrast":
            parts["sample"] = parts["C"][:, :1]
            parts["C"] = 0.1 * torch.randn(parts["C"].shape, generator=generator).to(W.dtype)
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


def quick(base: Path, adapter: Path, out: Path, **options: Any) -> MergeReport:
    return merge(base, adapter, out, **{"check": False, "progress": False, **options})


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


def make_quantized(tmp_path: Path, base: Path) -> tuple[Path, dict[str, torch.Tensor], list[str]]:
    quantized = [name.removesuffix(".weight") for name in weights(base) if name.endswith("proj.weight")]
    held = {name: nf4(W) if name.endswith("proj.weight") else W for name, W in weights(base).items()}
    adapter = make_secura(
        tmp_path / "adapter", base, held=held, base_quantization=NF4, quantized_modules=quantized
    )
    return adapter, held, quantized


# Edits for workers: a process that is spawned finds them by name.


def die(weight: torch.Tensor) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return weight


def fill_disk(weight: torch.Tensor) -> torch.Tensor:
    raise OSError(errno.ENOSPC, "No space left on device")


def break_weight(weight: torch.Tensor) -> torch.Tensor:
    return weight.fill_(float("inf"))


def fail(weight: torch.Tensor) -> torch.Tensor:
    return weight / (1 // 0)


def never_end(weight: torch.Tensor) -> torch.Tensor:
    time.sleep(600)
    return weight

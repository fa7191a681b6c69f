"""Peak memory and speed of the streaming merge, beside a plain copy and PEFT's merge_and_unload.

Builds a random, sharded, Llama-shaped bf16 checkpoint and a SECURA adapter on all its linear layers. Each
contender runs in a process of its own; memory is the growth of the resident set's peak over what the process
held after its imports (mapped files count), and processor seconds tell the work apart from a busy machine.
Exits with status 1 if the merge needs more than one output shard plus three times the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from secura_ds import SecuraConfig
from secura_ds.checkpoint_files import open_checkpoint
from secura_ds.files import atomic_write_json
from secura_ds.merge import merge
from secura_ds.merge.memory import PeakMemory
from secura_ds.method import cabr, cur

CONTENDERS = {
    "copy": "plain copy of the files",
    "stream": "secura_ds streaming merge",
    "peft": "PEFT merge_and_unload",
}
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def model_config(gigabytes: float, quick: bool) -> LlamaConfig:
    """A Llama of about this size in bf16, as deep as it takes."""
    hidden, vocabulary = (1024, 8000) if quick else (2048, 32000)
    intermediate, keys = hidden * 11 // 4, hidden // 4
    layer_elements = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * intermediate
    num_layers = max(1, round((gigabytes * 1e9 / 2 - vocabulary * hidden) / layer_elements))
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def build(folder: Path, config: LlamaConfig, shard_bytes: float, ranks: tuple[int, int]) -> None:
    """Write `folder/base` and `folder/adapter`; holds one shard at a time."""
    (folder / "base").mkdir()
    config.save_pretrained(folder / "base")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    shards: list[list[str]] = [[]]
    size = 0.0
    for name, shape in shapes.items():
        if shards[-1] and size + 2 * shape.numel() > shard_bytes:
            shards.append([])
            size = 0.0
        shards[-1].append(name)
        size += 2 * shape.numel()
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    adapter: dict[str, Tensor] = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: (0.02 * torch.randn(shapes[n], generator=generator)).bfloat16() for n in names}
        save_file(tensors, folder / "base" / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        for name, weight in tensors.items():
            if name.split(".")[-2] in ADAPTED:
                adapter |= adapter_parts(name.removesuffix(".weight"), weight, *ranks, generator)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors")
    SecuraConfig(
        cur_rank=ranks[0], inner_rank=ranks[1], target_modules=list(ADAPTED), smagnorm={"apply": "forward"}
    ).save_pretrained(str(folder / "adapter"))


def adapter_parts(
    module: str, W: Tensor, rank: int, inner: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """A random SECURA adapter of one layer, under the keys of the adapter's file."""
    rows, columns = cur.least_important(W, rank)
    parts = {
        "A": cabr.initial_a(W, rank, inner, "block"),
        "B": 0.1 * torch.randn(inner, rank, generator=generator),
        "C": W[:, columns],
        "R": W[rows],
        "U": 0.1 * torch.randn(rank, rank, generator=generator),
        "rows": rows,
        "columns": columns,
    }
    return {f"base_model.model.{module}.secura_{name}": tensor.contiguous() for name, tensor in parts.items()}


def contend(name: str, folder: Path) -> dict[str, float]:
    """Do the work in this process; its time, and how far its memory grew."""
    base, adapter, out = folder / "base", folder / "adapter", folder / f"out-{name}"
    if name == "peft":
        from peft import PeftModel
    memory, started, processor = PeakMemory(), time.perf_counter(), time.process_time()
    if name == "stream":
        merge(base, adapter, out, check=False)
    elif name == "peft":
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out)
    else:
        copy_durably(base, out)
    return {
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - processor,
        "peak_memory_bytes": memory.growth(),
    }


def copy_durably(source: Path, target: Path) -> None:
    """Copy the files and wait until the disk has them, as the merge does."""
    shutil.copytree(source, target)
    for file in target.iterdir():
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())


def measure(folder: Path, contenders: Sequence[str]) -> dict[str, Any]:
    """Run every contender in a process of its own on the same inputs."""
    checkpoint = open_checkpoint(folder / "base")
    largest = max(tensor.num_bytes for tensor in checkpoint.tensors.values())
    shard = max(file.size for file in checkpoint.files)
    rows: dict[str, Any] = {}
    for name in contenders:
        command = [sys.executable, __file__, "--contend", name, "--folder", str(folder)]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[name] = json.loads(result.stdout.splitlines()[-1])
        rows[name]["megabytes_per_second"] = checkpoint.num_bytes / 1e6 / rows[name]["seconds"]
        shutil.rmtree(folder / f"out-{name}")
    return {
        "bytes": checkpoint.num_bytes,
        "shards": len(checkpoint.files),
        "largest_shard_bytes": shard,
        "largest_tensor_bytes": largest,
        "bound_bytes": shard + 3 * largest,
        "within_bound": rows["stream"]["peak_memory_bytes"] <= shard + 3 * largest,
        "contenders": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The measurement as plain text."""
    lines = [
        f"{result['bytes'] / 1e9:.2f} GB in {result['shards']} shards, largest tensor "
        f"{result['largest_tensor_bytes'] / 2**20:.0f} MiB; bound: one shard + 3 x largest tensor = "
        f"{result['bound_bytes'] / 2**20:.0f} MiB",
        f"{'':28} {'seconds':>8} {'processor s':>12} {'MB/s':>7} {'peak MiB':>9}",
    ]
    for name, row in result["contenders"].items():
        times = f"{row['seconds']:8.1f} {row['processor_seconds']:12.1f} {row['megabytes_per_second']:7.0f}"
        lines.append(f"{CONTENDERS[name]:28} {times} {row['peak_memory_bytes'] / 2**20:9.0f}")
    lines.append("within the bound" if result["within_bound"] else "NOT within the bound")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks/merge_memory.py", description=__doc__)
    parser.add_argument("--gigabytes", type=float, help="size of the base (default 1.5, with --quick 0.2)")
    parser.add_argument("--shards", type=int, default=4, help="about how many (default 4)")
    parser.add_argument("--ranks", type=int, nargs=2, default=(64, 96), metavar=("R", "M"))
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--skip-peft", action="store_true", help="leave PEFT out")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=Path("runs/merge_memory.json"))
    parser.add_argument("--contend", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.contend:
        print(json.dumps(contend(options.contend, options.folder)))
        return 0
    gigabytes = options.gigabytes or (0.2 if options.quick else 1.5)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        config = model_config(gigabytes, options.quick)
        build(Path(name), config, gigabytes * 1e9 / options.shards, tuple(options.ranks))
        contenders = [name for name in CONTENDERS if name != "peft" or not options.skip_peft]
        result = measure(Path(name), contenders)
    atomic_write_json(options.out, result)
    print(table(result))
    return 0 if result["within_bound"] else 1


if __name__ == "__main__":
    sys.exit(main())

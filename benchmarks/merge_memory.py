"""Peak memory and speed of the merge beside a copy of the same files, and beside PEFT's merge_and_unload.

Two parts. "8B" is a random bf16 checkpoint of Llama 3.1 8B's shape (16 GB in 5 GB shards; with --quick 3 of
its 32 layers and a quarter of its vocabulary) with SECURA adapters on q and v and on all linear layers,
merged by one process and by two. "PEFT" is of a size that PEFT, which loads the model, can do beside it.

Every contender is a process tree of its own that reads from disk: before each one the pages of all input
files are dropped from the page cache, and the clock stops when the disk has what was written. The copy runs
first and last, and the faster of the two counts. Memory is the largest resident size of the whole tree,
libraries included, sampled every 50 ms: the sum over its processes (RSS), which counts a page as often as
processes share it, and beside it their proportional size (PSS), which counts it once. Exits with status 1 if
a merge of the 8B part needs more than 2 GB by the sum, or if neither number of workers reaches half the
copy's speed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from run_cost import tree_bytes
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from secura_ds import SecuraConfig
from secura_ds.checkpoint_files import INDEX_NAME, open_checkpoint
from secura_ds.files import atomic_write_json
from secura_ds.merge import merge
from secura_ds.method import cabr

TARGETS = {
    "q/v": ["q_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
RANK, INNER = 64, 96
MEMORY_GOAL = 2e9  # bytes
SPEED_GOAL = 0.5  # of the copy
CONTENDERS = {
    "copy": "plain copy of the files",
    "merge q/v 1": "merge, q and v",
    "merge q/v 2": "merge, q and v, --workers 2",
    "merge all 1": "merge, all linear layers",
    "merge all 2": "merge, all linear layers, --workers 2",
    "copy again": "plain copy of the files, again",
    "peft all": "PEFT merge_and_unload, all linear layers",
}


def llama_8b(num_layers: int = 32, vocabulary: int = 128256) -> LlamaConfig:
    """The shape of Llama 3.1 8B."""
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def llama_small(num_layers: int) -> LlamaConfig:
    """100 MB a layer, and 130 MB of embeddings, shared with the head."""
    return LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this configuration stores."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name not in tied}


def build(folder: Path, config: LlamaConfig, shard_bytes: float) -> None:
    """Write `folder/base` and `folder/adapter-*`; holds one tensor and the adapters' factors."""
    base = folder / "base"
    base.mkdir(parents=True)
    config.save_pretrained(base)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0.0
    for name, shape in tensor_shapes(config).items():
        num_bytes = 2 * float(np.prod(shape))
        if shards[-1] and size + num_bytes > shard_bytes:
            shards.append({})
            size = 0.0
        shards[-1][name] = shape
        size += num_bytes
    generator = np.random.Generator(np.random.SFC64(0))
    weight_map: dict[str, str] = {}
    adapters: dict[str, dict[str, Tensor]] = {key: {} for key in TARGETS}
    for i, shapes in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shapes, file)
        for name, weight in write_shard(base / file, shapes, generator):
            kind, module = name.split(".")[-2], name.removesuffix(".weight")
            if kind in TARGETS["all"]:
                parts = adapter_parts(module, weight, generator)
                for key in (key for key, kinds in TARGETS.items() if kind in kinds):
                    adapters[key] |= parts
    atomic_write_json(base / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})
    for key, kinds in TARGETS.items():
        adapter = folder / f"adapter-{key.replace('/', '')}"
        adapter.mkdir()
        save_file(adapters[key], adapter / "adapter_model.safetensors")
        SecuraConfig(
            cur_rank=RANK, inner_rank=INNER, target_modules=kinds, smagnorm={"apply": "forward"}
        ).save_pretrained(str(adapter))


def write_shard(
    path: Path, shapes: Mapping[str, tuple[int, ...]], generator: np.random.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Write random bf16 tensors one by one as a safetensors file; yields each of them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            bits = random_bits(int(np.prod(shape)), generator)
            file.write(bits.data)
            yield name, torch.from_numpy(bits).view(torch.bfloat16).view(shape)
        os.fsync(file.fileno())


def random_bits(count: int, generator: np.random.Generator) -> np.ndarray:
    """bf16 numbers of either sign between 2^-7 and 2^-3 as bits, many times faster than normal ones."""
    words = generator.integers(0, 2**64, size=-(-count // 4), dtype=np.uint64)
    bits: np.ndarray = words.view(np.uint16)[:count]
    bits &= 0x81FF  # sign, two bits of the exponent, mantissa
    bits |= 0x3C00
    return bits


def adapter_parts(module: str, W: Tensor, generator: np.random.Generator) -> dict[str, Tensor]:
    """A random SECURA adapter of one layer, under the keys of the adapter's file."""

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)) * 0.1

    indices = torch.arange(RANK)
    parts = {
        "A": cabr.initial_a(W, RANK, INNER, "block"),
        "B": normal(INNER, RANK),
        "C": W[:, indices],
        "R": W[indices],
        "U": normal(RANK, RANK),
        "rows": indices,
        "columns": indices.clone(),
    }
    return {f"base_model.model.{module}.secura_{name}": tensor.contiguous() for name, tensor in parts.items()}


def contend(name: str, folder: Path) -> dict[str, float]:
    """Do the work in this process and its workers; how long it took."""
    base, out = folder / "base", folder / "out"
    what, *rest = name.split()
    adapter = folder / f"adapter-{rest[0].replace('/', '')}" if what != "copy" else base
    if what == "peft":
        from peft import PeftModel
    started, processor = time.perf_counter(), processor_seconds()
    if what == "merge":
        merge(base, adapter, out, check=False, progress=False, workers=int(rest[1]))
    elif what == "peft":
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out)
        sync(out)
    else:
        shutil.copytree(base, out)
        sync(out)
    return {
        "seconds": time.perf_counter() - started,
        "processor_seconds": processor_seconds() - processor,
    }


def processor_seconds() -> float:
    """Of this process and of the workers that have ended."""
    return sum(os.times()[:4])


def sync(folder: Path) -> None:
    """Wait until the disk has the files, as the merge does."""
    for file in folder.iterdir():
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())


def drop_from_cache(folder: Path) -> None:
    """Let the next process read the files from disk."""
    os.sync()
    for file in (path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(name: str, folder: Path) -> dict[str, float]:
    """One contender in a process of its own: its times, and its largest resident memory."""
    drop_from_cache(folder)
    load = os.getloadavg()[0]
    command = [sys.executable, __file__, "--contend", name, "--folder", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    root, peak, proportional = psutil.Process(process.pid), 0, 0
    while process.poll() is None:
        with suppress(psutil.Error):
            peak = max(peak, sum(resident(p) for p in (root, *root.children(recursive=True))))
            proportional = max(proportional, tree_bytes(root))
        time.sleep(0.05)
    assert process.stdout is not None
    result = json.loads(process.stdout.read().splitlines()[-1])
    if process.returncode:
        raise RuntimeError(f"{name} failed with status {process.returncode}")
    shutil.rmtree(folder / "out")
    memory = {"peak_resident_bytes": peak, "peak_proportional_bytes": proportional}
    return {**result, **memory, "load_average_before": load}


def resident(process: psutil.Process) -> int:
    """Resident bytes of a process; 0 if it has just ended."""
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def measure(folder: Path, contenders: Sequence[str]) -> dict[str, Any]:
    """Every contender on the same inputs."""
    checkpoint = open_checkpoint(folder / "base")
    rows: dict[str, dict[str, float]] = {}
    for name in contenders:
        rows[name] = run(name, folder)
        print(f"  {CONTENDERS[name]}: {rows[name]['seconds']:.1f} s", file=sys.stderr, flush=True)
    copy = min(row["seconds"] for name, row in rows.items() if name.startswith("copy"))
    for row in rows.values():
        row["megabytes_per_second"] = checkpoint.num_bytes / 1e6 / row["seconds"]
        row["speed_of_copy"] = copy / row["seconds"]
    return {
        "bytes": checkpoint.num_bytes,
        "shards": len(checkpoint.files),
        "largest_tensor_bytes": max(tensor.num_bytes for tensor in checkpoint.tensors.values()),
        "contenders": rows,
    }


def table(title: str, part: Mapping[str, Any]) -> str:
    """One part as plain text."""
    lines = [
        f"{title}: {part['bytes'] / 1e9:.2f} GB in {part['shards']} shards",
        f"{'':42} {'seconds':>8} {'processor s':>12} {'MB/s':>6} {'of copy':>8} {'RSS MB':>8} {'PSS MB':>8}",
    ]
    for name, row in part["contenders"].items():
        lines.append(
            f"{CONTENDERS[name]:42} {row['seconds']:8.1f} {row['processor_seconds']:12.1f} "
            f"{row['megabytes_per_second']:6.0f} {row['speed_of_copy']:8.2f} "
            f"{row['peak_resident_bytes'] / 1e6:8.0f} {row['peak_proportional_bytes'] / 1e6:8.0f}"
        )
    return "\n".join(lines)


def goals(part: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the merges of a part stay within memory, and are fast enough with one worker or two."""
    rows = part["contenders"]
    speeds = {
        key: max(row["speed_of_copy"] for name, row in rows.items() if name.startswith(f"merge {key}"))
        for key in TARGETS
    }
    peak = max(row["peak_resident_bytes"] for name, row in rows.items() if name.startswith("merge"))
    return {
        "peak_resident_bytes": peak,
        "speed_of_copy": speeds,
        "met": peak <= MEMORY_GOAL and min(speeds.values()) >= SPEED_GOAL,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, measure, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks/merge_memory.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small models, a few minutes")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/merge_memory.json"))
    parser.add_argument("--contend", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.contend:
        print(json.dumps(contend(options.contend, options.folder)))
        return 0
    large = llama_8b(3, 32064) if options.quick else llama_8b()
    result: dict[str, Any] = {"processors": os.cpu_count(), "threads": torch.get_num_threads(), "parts": {}}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        parts = {
            "8B": (large, 1e9 if options.quick else 5e9, [n for n in CONTENDERS if n != "peft all"]),
            "PEFT": (llama_small(2 if options.quick else 14), 4e8, ["copy", "merge all 1", "peft all"]),
        }
        for title, (config, shard_bytes, contenders) in parts.items():
            size = sum(2 * float(np.prod(shape)) for shape in tensor_shapes(config).values())
            free, needed = shutil.disk_usage(name).free, 2.2 * size + 1e9
            if free < needed:
                reason = f"needs {needed / 1e9:.0f} GB of disk, {name} has {free / 1e9:.0f} GB free"
                result["parts"][title] = {"skipped": reason}
                print(f"{title}: skipped, {reason}")
                continue
            folder = Path(name) / title
            print(f"building {title}: {size / 1e9:.1f} GB", file=sys.stderr, flush=True)
            build(folder, config, shard_bytes)
            result["parts"][title] = measure(folder, contenders)
            shutil.rmtree(folder)
            print(table(title, result["parts"][title]))
    measured = result["parts"]["8B"]
    result["goals"] = None if "skipped" in measured else goals(measured)
    atomic_write_json(options.out, result)
    if result["goals"] is None:
        return 0
    met = result["goals"]["met"]
    print(f"within {MEMORY_GOAL / 1e9:.0f} GB and at {SPEED_GOAL} of the copy's speed or more: {met}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

"""What each rank runs for `test_streaming.py`: load 4-bit backbones in slices, and count what was held."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from secura_ds import sharding  # noqa: E402
from secura_ds.backbones import load_model  # noqa: E402
from secura_ds.errors import UserError  # noqa: E402
from secura_ds.peak_memory import PeakMemory  # noqa: E402
from secura_ds.ranks import end_process  # noqa: E402
from secura_ds.recipe import BackboneRecipe, Quantization  # noqa: E402

SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def recipe_of(folder: str, *, nf4: bool = True) -> BackboneRecipe:
    """A saved model as the backbone of a recipe."""
    quantization = Quantization() if nf4 else None
    return BackboneRecipe(model=folder, dtype="bfloat16", quantization=quantization, attention="eager")


def held_bytes() -> int:
    """Bytes of all tensors that this process can reach, each storage once."""
    gc.collect()
    tensors = (o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.device.type == "cpu")
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def value_of(module: Any) -> torch.Tensor:
    """The whole weight of a module, dequantized."""
    return sharding.dequantized(module) if sharding.is_quantized(module) else sharding.whole(module.weight)


def check(folder: Path, *, nf4: bool) -> dict[str, Any]:
    """One backbone loaded in slices, against the same loaded whole by transformers."""
    recipe = recipe_of(str(folder), nf4=nf4)
    alive = HfDeepSpeedConfig(SETTINGS)
    before, memory = held_bytes(), PeakMemory()
    model = load_model(recipe).requires_grad_(False)
    growth, held = memory.growth(), held_bytes() - before
    sharding.assert_partitioned(model)
    del alive
    unset_hf_deepspeed_config()
    whole = load_model(recipe)
    names, equal = [], []
    for (name, module), (_, expected) in zip(model.named_modules(), whole.named_modules(), strict=True):
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            names.append(name)
            read = (
                sharding.dequantized if sharding.is_quantized(module) else lambda m: sharding.whole(m.weight)
            )
            equal.append(torch.equal(read(module), read(expected)))
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad(), sharding.gathered_forward(model):
        logits = model(tokens).logits
    with torch.no_grad():
        gap = float((logits - whole(tokens).logits).abs().max())
    parameters = list(model.parameters())
    quantized = [module for module in model.modules() if sharding.is_quantized(module)]
    buffers = zip(model.buffers(), whole.buffers(), strict=True)
    return {
        "weights": len(names),
        "equal": all(equal),
        "quantized": len(quantized),
        "gap": gap,
        "growth": growth,
        "held": held,
        "slices": sum(p.ds_tensor.nbytes for p in parameters),
        "whole": sum(p.ds_numel * p.element_size() for p in parameters),
        "elements": sum(
            m.weight.quant_state.shape.numel() for m in model.modules() if sharding.is_quantized(m)
        ),
        "tied": [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model, whole)],
        "buffers": all(torch.equal(a, b) and a.dtype == b.dtype for a, b in buffers),
        "generation": model.generation_config.to_dict() == whole.generation_config.to_dict(),
        "name": model.name_or_path == whole.name_or_path,
        "quantization": str(getattr(model.config, "quantization_config", None))
        == str(getattr(whole.config, "quantization_config", None)),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbones", type=Path, nargs="+")
    parser.add_argument("--broken", type=Path)
    parser.add_argument("--renamed", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for a minute
    deepspeed.init_distributed()
    found: dict[str, Any] = {}
    for folder in arguments.backbones:
        for nf4 in (False, True):
            found[f"{folder.name}, {'nf4' if nf4 else 'bf16'}"] = check(folder, nf4=nf4)
    found["renamed"] = check(arguments.renamed, nf4=False)["equal"]
    alive = HfDeepSpeedConfig(SETTINGS)
    try:
        load_model(recipe_of(str(arguments.broken)))
    except UserError as error:
        found["broken"] = str(error)
    del alive
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, found)
    if dist.get_rank() == 0:
        arguments.out.write_text(json.dumps(everything))
    dist.barrier()


if __name__ == "__main__":
    main()
    end_process(0)

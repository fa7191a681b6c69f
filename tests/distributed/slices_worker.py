"""What each of four ranks runs for `test_sharded_slices.py`; started by the deepspeed launcher, writes JSON.

Groups of one to four of them partition the same weights with DeepSpeed's own `zero.Init` and fold them, with
every collective and every allocation counted; all four then train a toy model and fold it while DeepSpeed
still keeps whole copies of its weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import deepspeed
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import adapter_toys as toys  # noqa: E402
import zero3_worker as zero3  # noqa: E402
from allocated import AllocatedPeak  # noqa: E402

from secura_ds import sharding  # noqa: E402
from secura_ds.adapter import fold, layer_statistics, secura_layers  # noqa: E402
from secura_ds.method import cabr  # noqa: E402
from secura_ds.ranks import end_process  # noqa: E402
from secura_ds.sharding import fold as folding  # noqa: E402

WORLDS = (1, 2, 3, 4)
PIECE = 5001
# No number of ranks above 1 divides the first two; the third has fewer rows than ranks.
SHAPES = [(1031, 517), (53, 37), (3, 1001), (7, 5)]
RESTRAINTS = {
    "absolute": sharding.Restraint(),
    "relative": sharding.Restraint(eps=None, eps_relative=0.5),
    "average": sharding.Restraint(form="average"),
    "never": None,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Traffic(TorchDispatchMode):
    """Names and bytes of all collectives inside the block, whoever starts them."""

    def __enter__(self) -> Any:
        self.seen: list[tuple[str, int]] = []
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            size = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
            self.seen.append((func.overloadpacket._qualified_op_name.split("::")[1], size))
        return func(*args, **(kwargs or {}))


def updates_of(weights: list[Tensor], restraint: sharding.Restraint | None) -> list[sharding.SliceUpdate]:
    """Updates of rank 2, the same wherever they are made."""
    updates = []
    for i, weight in enumerate(weights):
        rows, columns = sharding.full_shape(weight)
        g = torch.Generator().manual_seed(i)
        C, core, R = (torch.randn(s, generator=g) for s in ((rows, 2), (2, 2), (2, columns)))
        updates.append(
            sharding.SliceUpdate(weight, C.to(weight.dtype), core, R.to(weight.dtype), 0.5, restraint)
        )
    return updates


def weights_of(shapes: list[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    """Random weights, the same on every rank."""
    return [
        torch.randn(s, generator=torch.Generator().manual_seed(10 + i)).to(dtype)
        for i, s in enumerate(shapes)
    ]


def partitioned(weights: list[Tensor], group: Any) -> list[nn.Parameter]:
    """The same cut by ZeRO-3 among the ranks of a group."""
    module = nn.Module()
    for i, weight in enumerate(weights):
        module.register_parameter(f"w{i}", nn.Parameter(weight.clone(), requires_grad=False))
    config = zero3.deepspeed_config()
    deepspeed.zero.Init(
        module=module, data_parallel_group=group, config_dict_or_path=config, dtype=weights[0].dtype
    )
    return list(module.parameters())


def check_bits(group: Any) -> dict[str, Any]:
    """Whether each rank's slice holds, bit for bit, its part of the unsharded fold; and what was sent."""
    equal: dict[str, bool] = {}
    traffic, mid_row = {}, 0
    for precision, dtype in DTYPES.items():
        for name, restraint in RESTRAINTS.items():
            whole, sharded = weights_of(SHAPES, dtype), partitioned(weights_of(SHAPES, dtype), group)
            padding = [sharding.local_slice(p).end - sharding.local_slice(p).start for p in sharded]
            behind = [p.ds_tensor[n:].clone() for p, n in zip(sharded, padding, strict=True)]
            with Traffic() as seen:
                sharding.fold_slices(updates_of(sharded, restraint))
            sharding.fold_slices(updates_of(whole, restraint))
            parts = [sharding.local_slice(p) for p in sharded]
            mid_row += sum(part.start % part.shape[1] > 0 for part in parts if part.start < part.end)
            equal[f"{precision}, {name}"] = all(
                torch.equal(p.ds_tensor[:n], w.flatten()[part.start : part.end])
                and torch.equal(p.ds_tensor[n:].view(torch.uint8), rest.view(torch.uint8))
                for p, part, w, n, rest in zip(sharded, parts, whole, padding, behind, strict=True)
            )
            equal[f"{precision}, {name}, gathered"] = all(
                torch.equal(sharding.whole(p), w) for p, w in zip(sharded, whole, strict=True)
            )
            traffic[name] = seen.seen
    return {"equal": equal, "traffic": traffic, "mid_row": mid_row}


def check_memory(group: Any) -> dict[int, int]:
    """The most extra bytes that a fold holds, by the number of rows of the weight."""
    peaks = {}
    for rows in (1000, 6000):
        (weight,) = partitioned(weights_of([(rows, 601)], torch.bfloat16), group)
        updates = updates_of([weight], sharding.Restraint())
        sharding.fold_slices(updates)
        with AllocatedPeak() as extra:
            sharding.fold_slices(updates)
        peaks[rows] = extra.bytes
    return peaks


def start(base: str, nf4: bool = False, **zero: Any) -> tuple[Any, Any]:
    """A toy model in fp32, or bf16 and NF4, and its engine, after three steps of training."""
    settings = {"strategy": "M2" if nf4 else "M1", "smagnorm": {"apply": "forward", "eps_relative": 0.5}}
    config = zero3.deepspeed_config(bf16=nf4, **zero)
    model, engine = zero3.start(base, settings, config, nf4)
    model.train()
    for batch in toys.tokens(batch=12, length=12).view(3, 4, 12):
        step(engine, batch)
    return model, engine


def step(engine: Any, batch: Tensor) -> None:
    """One step on this rank's row of `batch`."""
    own = batch[dist.get_rank()][None]
    engine.backward(engine(input_ids=own, labels=own).loss)
    engine.step()


def states(model: nn.Module) -> dict[str, int]:
    """How many of the adapted weights are whole, being gathered, or cut."""
    weights = [layer.get_base_layer().weight for layer in secura_layers(model).values()]
    names = [weight.ds_status.name for weight in weights]
    return {name: names.count(name) for name in ("AVAILABLE", "INFLIGHT", "NOT_AVAILABLE")}


COPIES: dict[str, tuple[dict[str, Any], bool]] = {
    # DeepSpeed gathers what is small again after every step; an evaluation begins a forward pass whose
    # backward pass never comes, for which weights are kept, or are being fetched.
    "persistent": (zero3.SOME_PERSISTENT, False),
    "kept": ({}, True),
    "fetched ahead": (zero3.PREFETCHING, True),
}


def check_copies(base: str) -> dict[str, Any]:
    """Fold while DeepSpeed keeps whole copies, for each reason it has; whether any of them is out of date."""
    return {name: fold_with_copies(base, zero, evaluate) for name, (zero, evaluate) in COPIES.items()}


def fold_with_copies(base: str, zero: dict[str, Any], evaluate: bool) -> dict[str, Any]:
    model, engine = start(base, **zero)
    if evaluate:
        with torch.no_grad():
            engine(input_ids=toys.tokens(1))
    layers = secura_layers(model)
    held = states(model)
    expected = {}
    for name, layer in layers.items():
        # From slices and masters: nothing that DeepSpeed keeps may change before the fold.
        weight = layer.get_base_layer().weight
        parts = [torch.empty_like(weight.ds_tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, weight.ds_tensor.data)
        W = torch.cat(parts)[: weight.ds_numel].view(weight.ds_shape)
        A, B = (sharding.master(m["default"]) for m in (layer.secura_A, layer.secura_B))
        core = cabr.core(A, B, layer.secura_U["default"])
        C, R, config = layer.secura_C["default"], layer.secura_R["default"], layer.configs["default"]
        update = sharding.SliceUpdate(W, C, core, R, config.scaling, config.restraint)
        sharding.fold_slices([update])
        expected[name] = W
    assert states(model) == held
    with Traffic() as seen:
        fold(model)
    left = states(model)
    plain = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, W in expected.items():
        plain.get_submodule(name).weight.data = W
    with torch.no_grad():
        logits = engine(input_ids=toys.tokens()).logits
    result = {
        "held": held,
        "left": left,
        "equal": all(
            torch.equal(sharding.whole(la.get_base_layer().weight), expected[n]) for n, la in layers.items()
        ),
        "logit_gap": float((logits - toys.logits(plain)).abs().max()),
        "traffic": seen.seen,
    }
    engine.destroy()
    return result


def check_m2(base: str) -> dict[str, Any]:
    """What a fold by M2 sends and holds: nothing of the size of a weight, only A, B and U."""
    model, engine = zero3.start(base, {"smagnorm": {"apply": "forward"}})
    model.train()
    step(engine, toys.tokens(4))
    before = [layer.get_base_layer().weight.ds_tensor.clone() for layer in secura_layers(model).values()]
    with Traffic() as seen, AllocatedPeak() as extra:
        fold(model)
    layers = secura_layers(model).values()
    trained = sum(
        p.ds_tensor.numel() * 4 * dist.get_world_size() for p in model.parameters() if p.requires_grad
    )
    result = {
        "traffic": seen.seen,
        "trained_bytes": trained,
        "extra_bytes": extra.bytes,
        "unchanged": all(
            torch.equal(b, la.get_base_layer().weight.ds_tensor) for b, la in zip(before, layers, strict=True)
        ),
        "moved": all(bool(la.secura_U["default"].any()) for la in layers),
    }
    engine.destroy()
    return result


def check_packed(group: Any) -> dict[str, int]:
    """4-bit slices against the whole dequantized weights: how many differ, and begin within a block of 64."""
    linears = []
    for i, (rows, columns) in enumerate([(53, 192), (64, 64), (1, 128)]):
        torch.manual_seed(i)
        linear = bnb.nn.Linear4bit(
            columns,
            rows,
            bias=False,
            quant_type="nf4",
            quant_storage=torch.bfloat16,
            compute_dtype=torch.bfloat16,
        )
        linears.append(linear.bfloat16().to("cpu"))
    wholes = [sharding.dequantized(linear).flatten() for linear in linears]
    module = nn.ModuleList(linears)
    config = zero3.deepspeed_config(bf16=True)
    deepspeed.zero.Init(
        module=module, data_parallel_group=group, config_dict_or_path=config, dtype=torch.bfloat16
    )
    pieces = [sharding.local_slice(linear.weight) for linear in linears]
    return {
        "differ": sum(
            not torch.equal(
                piece.read(piece.start, piece.end, torch.empty(piece.end - piece.start)),
                whole[piece.start : piece.end].float(),
            )
            for piece, whole in zip(pieces, wholes, strict=True)
        ),
        "mid_block": sum(piece.start % 64 > 0 for piece in pieces),
        "elements": sum(piece.end - piece.start for piece in pieces),
    }


def check_nf4(base: str) -> dict[str, Any]:
    """Statistics of a sharded 4-bit model, on every rank and in one process, and what they send."""
    model, engine = start(base, nf4=True)
    with Traffic() as seen:
        statistics = layer_statistics(model)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, statistics)
    trained = {n: sharding.master(p) for n, p in model.named_parameters() if p.requires_grad}
    settings = {"smagnorm": {"apply": "forward", "eps_relative": 0.5}}
    alone = get_peft_model(toys.nf4_llama(base), toys.config(**settings))
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            parameter.data = trained[name].view(parameter.shape).bfloat16()
    result = {
        "agree": all(other == statistics for other in gathered),
        "statistics": statistics,
        "alone": layer_statistics(alone),
        "traffic": seen.seen,
    }
    engine.destroy()
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for a minute
    deepspeed.init_distributed()
    rank = dist.get_rank()
    # So that toy weights, too, are cut into many blocks, and these into pieces.
    cabr.BLOCK_ELEMENTS, folding._CPU_PIECE = 2**15, PIECE
    result: dict[str, Any] = {
        "copies": check_copies(arguments.base),
        "M2": check_m2(arguments.base),
        "nf4": check_nf4(arguments.base),
        "bits": {},
        "packed": {},
        "memory": {},
    }
    # Last, for after it the ranks no longer number their parameters alike, which engines check.
    groups = [dist.new_group(list(range(world))) for world in WORLDS]
    for world, group in zip(WORLDS, groups, strict=True):
        if rank < world:
            result["bits"][world] = check_bits(group)
            result["packed"][world] = check_packed(group)
            result["memory"][world] = check_memory(group)
        dist.barrier()
    arguments.out.with_suffix(f".{rank}.json").write_text(json.dumps(result))
    dist.barrier()


if __name__ == "__main__":
    main()
    end_process(0)

"""What each rank runs for `test_sharding.py`; started by the deepspeed launcher, writes numbers as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import adapter_toys as toys  # noqa: E402

from secura_ds import sharding  # noqa: E402
from secura_ds.adapter import adapter_state, fold, layer_statistics, save_adapter, secura_layers  # noqa: E402
from secura_ds.errors import UserError  # noqa: E402
from secura_ds.ranks import end_process  # noqa: E402

LEARNING_RATE = 0.02
OFFLOADED = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
# Fetches ahead of use, and lets go of what was used at once.
PREFETCHING = {
    "overlap_comm": True,
    "stage3_prefetch_bucket_size": 10_000,
    "stage3_max_live_parameters": 30_000,
    "stage3_max_reuse_distance": 0,
}
# Between the sizes of a q_proj (64 x 64) and a gate_proj (160 x 64).
SOME_PERSISTENT = {"stage3_param_persistence_threshold": 64 * 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "merge": {"apply": "merge"},
    "merge, reentrant": {"apply": "merge", "checkpointing": True},
    "merge, not reentrant": {"apply": "merge", "checkpointing": False},
    "forward": {"apply": "forward"},
    "forward, reentrant": {"apply": "forward", "checkpointing": True},
    "forward, not reentrant": {"apply": "forward", "checkpointing": False},
    "forward, accumulated": {"apply": "forward", "accumulate": 2},
    "forward, accumulated, reentrant": {"apply": "forward", "accumulate": 2, "checkpointing": True},
    "forward, offloaded": {"apply": "forward", "zero": OFFLOADED, "checkpointing": False},
    "forward, prefetching": {"apply": "forward", "zero": PREFETCHING},
    "forward, M1": {"apply": "forward", "strategy": "M1"},
    "forward, M1, relative eps": {"apply": "forward", "strategy": "M1", "eps_relative": 0.5},
    "forward, M1, offloaded": {"apply": "forward", "strategy": "M1", "zero": OFFLOADED},
    "forward, M1, persistent": {
        "apply": "forward",
        "strategy": "M1",
        "zero": {"stage3_param_persistence_threshold": 10**6},
    },
    "forward, M1, some persistent, prefetching": {
        "apply": "forward",
        "strategy": "M1",
        "zero": PREFETCHING | SOME_PERSISTENT,
        "accumulate": 2,
    },
    "forward, ZeRO-2": {"apply": "forward", "zero": {"stage": 2}},
}
# Not bit-equal on two ranks, because the mean over the batch is rounded to bf16 elsewhere.
BF16_VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {"apply": "forward", "bf16": True},
    "4-bit, merge": {"apply": "merge", "bf16": True, "nf4": True},
    "4-bit, forward": {"apply": "forward", "bf16": True, "nf4": True},
}

# What one rank under the launcher does too, in the bits of a process without DeepSpeed.
ALONE = (
    "forward",
    "forward, reentrant",
    "forward, accumulated",
    "forward, offloaded",
    "forward, M1, relative eps",
    "forward, M1, some persistent, prefetching",
    "forward, ZeRO-2",
)


def variant_config(variant: dict[str, Any]) -> dict[str, Any]:
    """The SecuraConfig settings of one variant."""
    smagnorm = {key: variant[key] for key in ("apply", "eps_relative") if key in variant}
    return {"smagnorm": smagnorm, "strategy": variant.get("strategy", "M2")}


def batches(size: int) -> Tensor:
    """Token ids (steps, batch, length)."""
    return toys.tokens(batch=5 * size, length=12).view(5, size, 12)


def prepare(model: PeftModel, variant: dict[str, Any]) -> None:
    """Training mode, with the variant's kind of gradient checkpointing."""
    model.train()
    if "checkpointing" in variant:
        model.gradient_checkpointing_enable({"use_reentrant": variant["checkpointing"]})
        model.enable_input_require_grads()


def deepspeed_config(bf16: bool = False, accumulate: int = 1, **zero: Any) -> dict[str, Any]:
    """A DeepSpeed configuration for one sample on each rank at a time; `zero` are settings of its section."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "bf16": {"enabled": bf16},
        # torch's AdamW also where the optimizer is offloaded, as the single process has it.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0} | zero,
    }


def load_plain(base: str | Path, bf16: bool = False, nf4: bool = False) -> LlamaForCausalLM:
    """The saved toy model."""
    if nf4:
        return toys.nf4_llama(base)
    return LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16 if bf16 else torch.float32)


def load(base: str, config: dict[str, Any], nf4: bool = False) -> LlamaForCausalLM:
    """The same, sharded while it is loaded where the stage is 3 (4-bit weights by the engine, later)."""
    keep_alive = HfDeepSpeedConfig(config)
    model = load_plain(base, config["bf16"]["enabled"], nf4)
    del keep_alive
    return model


def start(
    base: str, settings: dict[str, Any], config: dict[str, Any] | None = None, nf4: bool = False
) -> tuple[PeftModel, Any]:
    """A toy model with an adapter, and the engine that trains it."""
    config = config or deepspeed_config()
    model = get_peft_model(load(base, config, nf4), toys.config(**settings))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)
    return model, deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def losses_of(base: str, variant: dict[str, Any]) -> list[float]:
    """Losses of a run on all ranks, averaged over them."""
    accumulate = variant.get("accumulate", 1)
    config = deepspeed_config(variant.get("bf16", False), accumulate, **variant.get("zero", {}))
    model, engine = start(base, variant_config(variant), config, variant.get("nf4", False))
    prepare(model, variant)
    check_start(model, engine, variant)

    def step(batch: Tensor) -> float:
        total = torch.zeros(())
        for own in batch.view(dist.get_world_size(), accumulate, 1, -1)[dist.get_rank()]:
            loss = engine(input_ids=own, labels=own).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / accumulate
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()

    losses = toys.train(model, step, batches(dist.get_world_size() * accumulate), fold_every=2)
    engine.destroy()
    return losses


def check_start(model: PeftModel, engine: Any, variant: dict[str, Any]) -> None:
    """The engine has what the variant says, and owns no fp32 master of a frozen weight."""
    adapter = next(iter(secura_layers(model).values()))
    expected = torch.bfloat16 if variant.get("bf16") else torch.float32
    assert adapter.secura_A["default"].dtype == adapter.secura_B["default"].dtype == expected
    assert adapter.secura_U["default"].dtype == torch.float32
    zero = variant.get("zero", {})
    assert (engine.zero_offload_param() is not None) == (zero == OFFLOADED) == engine.zero_cpu_offload()
    if zero.get("stage", 3) == 3:
        masters = sum(flat.numel() for flat in engine.optimizer.fp32_partitioned_groups_flat)
        assert masters == sum(p.ds_tensor.numel() for p in model.parameters() if p.requires_grad)


def check_creation(base: str) -> dict[str, Any]:
    """The most weight elements that are whole at once while the adapter is made, and what cannot be done."""
    model = load(base, deepspeed_config())
    weights, most, gather = list(model.parameters()), 0, deepspeed.zero.GatheredParameters.__enter__

    def watch(self: Any) -> None:
        nonlocal most
        gather(self)
        most = max(most, sum(p.ds_numel for p in weights if sharding.is_available(p)))

    deepspeed.zero.GatheredParameters.__enter__ = watch
    model = get_peft_model(model, toys.config(smagnorm={"apply": "forward"}))
    deepspeed.zero.GatheredParameters.__enter__ = gather
    sharding.assert_partitioned(model)
    adapter = next(iter(secura_layers(model).values()))
    with sharding.gathered_forward(model):
        whole_logits = toys.logits(model)
    return {
        "most": most,
        "largest": max(p.ds_numel for n, p in model.named_parameters() if n.endswith("base_layer.weight")),
        "available_after": sum(sharding.is_available(p) for p in weights),
        "adapter_dtype": str(adapter.secura_A["default"].dtype),
        "logits": whole_logits.tolist(),
        "merge": refusal(model.merge_and_unload),
        "unsharded": refusal(lambda: sharding.assert_partitioned(toys.toy_llama().requires_grad_(False))),
    }


def check_saving(base: str, folder: Path) -> dict[str, Any]:
    """Save an adapter whose A and B are sharded; write whole values; read statistics."""
    model, engine = start(base, {"smagnorm": {"apply": "forward"}})
    for i, layer in enumerate(secura_layers(model).values()):
        B = layer.secura_B["default"]
        sharding.set_parameter(
            B, torch.randn(sharding.full_shape(B), generator=torch.Generator().manual_seed(i))
        )
    state = adapter_state(model)
    save_adapter(model, folder)
    statistics = layer_statistics(model)
    first = next(iter(secura_layers(model).values())).secura_B["default"]
    master = deepspeed.utils.safe_get_full_fp32_param(first)
    same = float((master - sharding.whole(first)).abs().max())
    fold(model)
    left = float(deepspeed.utils.safe_get_full_fp32_param(first).abs().max())
    loaded = PeftModel.from_pretrained(load(base, deepspeed_config()), folder)
    with sharding.gathered_forward(loaded):
        loaded_logits = toys.logits(loaded)
    result = {
        "logits": loaded_logits.tolist(),
        "foreign": refusal(
            lambda: PeftModel.from_pretrained(load(f"{base}-foreign", deepspeed_config()), folder)
        ),
        "empty": [k for k, v in state.items() if v.numel() == 0],
        "keys": len(state),
        "statistics": statistics,
        "master_difference": same,
        "master_after_fold": left,
        "plain_save": refusal(lambda: model.save_pretrained(str(folder / "plain"))),
    }
    engine.destroy()
    return result


def refusal(action: Any) -> str:
    """The message of the UserError that `action` raises."""
    try:
        action()
    except UserError as error:
        return str(error)
    return "nothing was refused"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for a minute
    deepspeed.init_distributed()
    variants = VARIANTS | BF16_VARIANTS
    if dist.get_world_size() == 1:
        variants = {name: variants[name] for name in ALONE}
    result: dict[str, Any] = {
        "losses": {name: losses_of(arguments.base, variant) for name, variant in variants.items()}
    }
    if dist.get_world_size() > 1:
        result["creation"] = check_creation(arguments.base)
        result["saving"] = check_saving(arguments.base, arguments.out.parent / "adapter")
    if dist.get_rank() == 0:
        arguments.out.write_text(json.dumps(result))
    dist.barrier()


if __name__ == "__main__":
    main()
    end_process(0)

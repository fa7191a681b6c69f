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
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import adapter_toys as toys  # noqa: E402

from secura_ds import sharding  # noqa: E402
from secura_ds.adapter import adapter_state, fold, layer_statistics, save_adapter, secura_layers  # noqa: E402
from secura_ds.errors import UserError  # noqa: E402

LEARNING_RATE = 0.02
VARIANTS: dict[str, dict[str, Any]] = {
    "merge": {"apply": "merge"},
    "merge, reentrant": {"apply": "merge", "checkpointing": True},
    "merge, not reentrant": {"apply": "merge", "checkpointing": False},
    "forward": {"apply": "forward"},
    "forward, reentrant": {"apply": "forward", "checkpointing": True},
    "forward, not reentrant": {"apply": "forward", "checkpointing": False},
    "forward, M1": {"apply": "forward", "strategy": "M1"},
    "forward, M1, persistent": {"apply": "forward", "strategy": "M1", "threshold": 10**6},
    "forward, ZeRO-2": {"apply": "forward", "stage": 2},
}
# Not bit-equal on two ranks, because the mean over the batch is rounded to bf16 elsewhere.
BF16_VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {"apply": "forward", "bf16": True},
    "4-bit, merge": {"apply": "merge", "bf16": True, "nf4": True},
    "4-bit, forward": {"apply": "forward", "bf16": True, "nf4": True},
}


def variant_config(variant: dict[str, Any]) -> dict[str, Any]:
    """The SecuraConfig settings of one variant."""
    return {"smagnorm": {"apply": variant["apply"]}, "strategy": variant.get("strategy", "M2")}


def batches() -> Tensor:
    """Token ids (steps, batch 2, length)."""
    return toys.tokens(batch=10, length=12).view(5, 2, 12)


def prepare(model: PeftModel, variant: dict[str, Any]) -> None:
    """Training mode, with the variant's kind of gradient checkpointing."""
    model.train()
    if "checkpointing" in variant:
        model.gradient_checkpointing_enable({"use_reentrant": variant["checkpointing"]})
        model.enable_input_require_grads()


def deepspeed_config(stage: int = 3, threshold: int = 0, bf16: bool = False) -> dict[str, Any]:
    """A DeepSpeed configuration for one sample on each rank."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": threshold},
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


def start(base: str, settings: dict[str, Any], nf4: bool = False, **zero: Any) -> tuple[PeftModel, Any]:
    """A toy model with an adapter, and the engine that trains it."""
    config = deepspeed_config(**zero)
    model = get_peft_model(load(base, config, nf4), toys.config(**settings))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)
    return model, deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def losses_of(base: str, variant: dict[str, Any]) -> list[float]:
    """Losses of a two-rank run, averaged over the ranks."""
    zero = {key: variant[key] for key in ("stage", "threshold", "bf16", "nf4") if key in variant}
    model, engine = start(base, variant_config(variant), **zero)
    prepare(model, variant)
    adapter = next(iter(secura_layers(model).values()))
    expected = torch.bfloat16 if variant.get("bf16") else torch.float32
    assert adapter.secura_A["default"].dtype == adapter.secura_B["default"].dtype == expected
    assert adapter.secura_U["default"].dtype == torch.float32

    def step(batch: Tensor) -> float:
        own = batch[dist.get_rank()][None]
        loss = engine(input_ids=own, labels=own).loss
        engine.backward(loss)
        engine.step()
        value = loss.detach().float().clone()
        dist.all_reduce(value)
        return float(value) / dist.get_world_size()

    losses = toys.train(model, step, batches(), fold_every=2)
    engine.destroy()
    return losses


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


SHAPES = [(1031, 517), (3, 1001), (53, 37), (7, 5)]


def slice_updates(weights: list[Tensor], restraint: sharding.Restraint | None) -> list[sharding.SliceUpdate]:
    """Updates of rank 2 for weights of SHAPES, the same wherever they are made."""
    updates = []
    for i, (weight, (rows, columns)) in enumerate(zip(weights, SHAPES, strict=True)):
        g = torch.Generator().manual_seed(i)
        C, core, R = (torch.randn(s, generator=g) for s in ((rows, 2), (2, 2), (2, columns)))
        updates.append(sharding.SliceUpdate(weight, C, core, R, 0.5, restraint))
    return updates


def uneven_weights() -> list[Tensor]:
    return [torch.randn(s, generator=torch.Generator().manual_seed(10 + i)) for i, s in enumerate(SHAPES)]


RESTRAINTS = {
    "absolute": sharding.Restraint(),
    "relative": sharding.Restraint(eps=None, eps_relative=0.5),
    "average": sharding.Restraint(form="average"),
    "never": None,
}


def check_slices() -> dict[str, bool]:
    """Whether M1 on the slices of uneven weights gives the bits of the unsharded fold."""
    result = {}
    for name, restraint in RESTRAINTS.items():
        module = nn.Module()
        for i, weight in enumerate(uneven_weights()):
            module.register_parameter(f"w{i}", nn.Parameter(weight))
        deepspeed.zero.Init(module=module, config_dict_or_path=deepspeed_config())
        sharded = list(module.parameters())
        sharding.fold_slices(slice_updates(sharded, restraint))
        expected = uneven_weights()
        sharding.fold_slices(slice_updates(expected, restraint))
        result[name] = all(torch.equal(sharding.whole(p), e) for p, e in zip(sharded, expected, strict=True))
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    result = {
        "creation": check_creation(arguments.base),
        "slices": check_slices(),
        "saving": check_saving(arguments.base, arguments.out.parent / "adapter"),
        "losses": {
            name: losses_of(arguments.base, variant) for name, variant in (VARIANTS | BF16_VARIANTS).items()
        },
    }
    if dist.get_rank() == 0:
        arguments.out.write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

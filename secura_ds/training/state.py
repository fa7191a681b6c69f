"""Between a live training run and a `Checkpoint`: what is taken from it, and how it is put back."""

from __future__ import annotations

import base64
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from secura_ds import sharding
from secura_ds.adapter import SecuraConfig, secura_layers
from secura_ds.environment import is_main_process, rank, world_size
from secura_ds.errors import UserError
from secura_ds.ranks import from_all
from secura_ds.training.checkpoint import Checkpoint
from secura_ds.training.model import accumulators, trainable

if TYPE_CHECKING:
    from secura_ds.training.trainer import Trainer


def capture(trainer: Trainer) -> Checkpoint:
    """Gather the whole state of training. Collective; the main process alone needs the result.

    Raises:
        UserError: a trained parameter is not finite, so that the earlier checkpoint is the better one.
    """
    model = trainer.model
    parameters = trainable(model)
    main = is_main_process()
    trained: dict[str, Tensor] = {}
    broken = []
    for name, parameter in parameters.items():
        value = sharding.master(parameter)
        if not torch.isfinite(value).all():
            broken.append(name)
        if main:
            trained[name] = value.to("cpu", copy=True)
    if broken:
        raise UserError(
            f"{len(broken)} trained parameters are not finite, the first is {broken[0]}; nothing was "
            "saved, so the earlier checkpoint stays: try a lower training.learning_rate"
        )
    trained.update((n, u.detach().to("cpu", copy=True)) for n, u in accumulators(model).items() if u.any())
    folded = _folded(model)
    if folded:
        trained.update(
            (f"{name}.base_layer.weight", sharding.whole(w, keep=main))
            for name, w in _base_weights(model).items()
        )
    tensors, numbers = sharding.optimizer_state(_inner(trainer.optimizer), parameters, keep=main)
    state = {
        "format": 1,
        "step": trainer.state.global_step,
        "world_size": world_size(),
        "batch": trainer.batch_over_all_ranks,
        "folded": folded,
        "optimizer_numbers": numbers,
        "schedule_steps": trainer.lr_scheduler.last_epoch,
        "counters": trainer.counters(),
        "ranks": from_all({"random": random_state(), "loss": trainer.unlogged_loss()}),
    }
    return Checkpoint(trained, tensors, state, trainer.state_json())


def restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Put a checkpoint into a prepared trainer: parameters, optimizer, schedule, counters. Collective."""
    model, state = trainer.model, checkpoint.state
    parameters = trainable(model)
    missing = [name for name in parameters if name not in checkpoint.trained]
    if missing:
        raise UserError(
            f"the checkpoint lacks {len(missing)} parameters, the first is {missing[0]}: use --overwrite"
        )
    for name, parameter in parameters.items():
        sharding.set_parameter(parameter, checkpoint.trained[name])
    for name, U in accumulators(model).items():
        U.copy_(checkpoint.trained.get(name, torch.zeros_like(U)))
    if state["folded"]:
        for name, weight in _base_weights(model).items():
            sharding.set_parameter(weight, checkpoint.trained[f"{name}.base_layer.weight"])
        model.peft_config["default"].folded = True
    for layer in secura_layers(model).values():
        layer.forget()
    optimizer = _inner(trainer.optimizer)
    sharding.load_optimizer_state(optimizer, parameters, checkpoint.optimizer, state["optimizer_numbers"])
    _move_schedule(trainer.lr_scheduler, state["schedule_steps"])


def own_part(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What this rank alone had saved; None if the run had fewer ranks then."""
    parts: list[dict[str, Any]] = checkpoint.state["ranks"]
    return parts[rank()] if rank() < len(parts) else None


def check_batch(state: dict[str, Any], batch: int, micro_batch: int) -> None:
    """Refuse to go on with another number of examples per step: the order of examples would not be the same.

    Raises:
        UserError: says which gradient accumulation gives the batch of the checkpoint.
    """
    before = state["batch"]
    if before == batch:
        return
    per_pass = micro_batch * world_size()
    remedy = (
        f"set training.gradient_accumulation_steps={before // per_pass}"
        if before % per_pass == 0
        else f"choose micro_batch_size x gradient_accumulation_steps x {world_size()} = {before}"
    )
    raise UserError(
        f"--resume: a step now takes {batch} examples over {world_size()} ranks, but took {before} over "
        f"{state['world_size']} when the checkpoint was written: {remedy}"
    )


def random_state() -> dict[str, Any]:
    """The state of every random number generator of this process, JSON-able."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": _encode(torch.random.get_rng_state()),
        "cuda": [_encode(s) for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set every generator as `random_state` found it."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(_decode(state["torch"]))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_decode(s) for s in state["cuda"]])


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _move_schedule(scheduler: LambdaLR, steps: int) -> None:
    """Go to where the schedule stood; its course is made anew from the recipe, for any number of groups."""
    scheduler.last_epoch, scheduler._step_count = steps, steps + 1
    scheduler._last_lr = [b * f(steps) for b, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def _folded(model: PeftModel) -> bool:
    config = model.peft_config["default"]
    return isinstance(config, SecuraConfig) and config.folded


def _base_weights(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: layer.get_base_layer().weight for name, layer in secura_layers(model).items()}


def _inner(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper: torch's own, or DeepSpeed's ZeRO optimizer."""
    return getattr(optimizer, "optimizer", optimizer)

"""Between a live training run and a `Checkpoint`: what is taken from it, and how it is put back."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from secura_ds import sharding
from secura_ds.adapter import secura_layers
from secura_ds.environment import is_main_process, rank, world_size
from secura_ds.errors import Diverged, UserError, first_line
from secura_ds.ranks import from_all
from secura_ds.training.checkpoint import Checkpoint
from secura_ds.training.model import accumulators, secura_config, trainable

if TYPE_CHECKING:
    from secura_ds.training.trainer import Trainer

STRATEGY = "strategy/"
"""Before the name of a tensor that belongs to the strategy of continual learning."""


def capture(trainer: Trainer) -> Checkpoint:
    """Gather the whole state of training. Collective; the main process alone needs the result.

    Raises:
        Diverged: a trained parameter is not finite, so that the earlier checkpoint is the better one.
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
        raise Diverged(
            f"{len(broken)} trained parameters are not finite, the first is {broken[0]}; nothing was "
            "saved, so the earlier checkpoint stays: try a lower training.learning_rate"
        )
    trained.update((n, u.detach().to("cpu", copy=True)) for n, u in accumulators(model).items() if u.any())
    trained.update((STRATEGY + name, value) for name, value in trainer.strategy.state().items())
    tensors, numbers = sharding.optimizer_state(_inner(trainer.optimizer), parameters, keep=main)
    state = {
        "format": 1,
        "step": trainer.state.global_step,
        "world_size": world_size(),
        "batch": trainer.batch_over_all_ranks,
        "folded": _folded(model),
        "optimizer_numbers": numbers,
        "schedule_steps": trainer.lr_scheduler.last_epoch,
        "loss_scale": loss_scale(trainer),
        "counters": trainer.counters(),
        "ranks": from_all({"random": random_state(), "loss": trainer.unlogged_loss()}),
    }
    return Checkpoint(trained, tensors, state, trainer.state_json())


def folded_weights(model: nn.Module, most: int = 10**9) -> Iterator[dict[str, Tensor]]:
    """The weights that M1 has folded, gathered one at a time, up to `most` bytes together. Collective.

    Only the main process is given them; the other ranks take part.
    """
    part: dict[str, Tensor] = {}
    for name, weight in _base_weights(model).items() if _folded(model) else ():
        size = sharding.full_shape(weight).numel() * weight.element_size()
        if part and size + sum(value.nbytes for value in part.values()) > most:
            yield part
            part = {}
        part[name] = sharding.whole(weight, keep=is_main_process())
    if part:
        yield part


def restore(trainer: Trainer, checkpoint: Checkpoint, folded: Iterable[tuple[str, Tensor]]) -> None:
    """Put a checkpoint into a prepared trainer: parameters, optimizer, schedule, counters. Collective.

    Args:
        folded: the weights that M1 has folded, read one after another.

    Raises:
        UserError: the checkpoint belongs to another adapter or backbone.
    """
    state, parameters = checkpoint.state, trainable(trainer.model)
    restore_weights(trainer.model, checkpoint, folded)
    optimizer = _inner(trainer.optimizer)
    sharding.load_optimizer_state(optimizer, parameters, checkpoint.optimizer, state["optimizer_numbers"])
    _move_schedule(trainer.lr_scheduler, state["schedule_steps"])
    _restore_loss_scale(trainer, state["loss_scale"])
    own = {n.removeprefix(STRATEGY): v for n, v in checkpoint.trained.items() if n.startswith(STRATEGY)}
    trainer.strategy.restore(own)


def restore_weights(model: nn.Module, checkpoint: Checkpoint, folded: Iterable[tuple[str, Tensor]]) -> None:
    """Put what a checkpoint holds of the model into it: trained parameters, U and folded weights. Collective.

    Args:
        folded: the weights that M1 has folded, read one after another.

    Raises:
        UserError: the checkpoint belongs to another adapter or backbone.
    """
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
    if checkpoint.state["folded"]:
        _restore_folded(model, folded)
    for layer in secura_layers(model).values():
        layer.forget()


def begin_with_weights(model: nn.Module, adapter: Path) -> None:
    """Put the weights that an earlier adapter, of M1, has changed into the model; nothing else. Collective.

    Raises:
        UserError: the adapter is damaged, or belongs to another one than this.
    """
    keys = {f"base_model.model.{name}.secura_W": name for name in _base_weights(model)}
    path = adapter / SAFETENSORS_WEIGHTS_NAME
    try:
        with safe_open(str(path), framework="pt") as file:
            if missing := sorted(keys.keys() - set(file.keys())):
                raise UserError(
                    f"{path} lacks {missing[0]}: delete the folder of its sequence, to train that again"
                )
            _restore_folded(model, ((name, file.get_tensor(key)) for key, name in keys.items()))
    except (OSError, SafetensorError) as error:
        reason = first_line(error)
        raise UserError(
            f"{path} is missing or damaged ({reason}): delete the folder of its sequence, to train that again"
        ) from error
    for layer in secura_layers(model).values():
        layer.forget()


def _restore_folded(model: nn.Module, folded: Iterable[tuple[str, Tensor]]) -> None:
    weights = _base_weights(model)
    for name, value in folded:
        if name not in weights:
            raise UserError(f"the checkpoint's folded weight {name} is not adapted here: use --overwrite")
        sharding.set_parameter(weights.pop(name), value)
    if weights:
        raise UserError(f"the checkpoint lacks the folded weight {next(iter(weights))}: use --overwrite")
    config = secura_config(model)
    assert config is not None
    config.folded = True


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


def loss_scale(trainer: Trainer) -> dict[str, Any] | None:
    """What scales float16 losses, and its counters, as JSON-able numbers; None for other dtypes."""
    scaler = _scaler(trainer)
    if scaler is None:
        return None
    state = scaler.state_dict() if isinstance(scaler, torch.amp.GradScaler) else vars(scaler)
    return {key: value for key, value in state.items() if isinstance(value, bool | int | float)}


def _restore_loss_scale(trainer: Trainer, state: dict[str, Any] | None) -> None:
    scaler = _scaler(trainer)
    if scaler is None or state is None:
        return
    if isinstance(scaler, torch.amp.GradScaler):
        scaler.load_state_dict(state)
    else:
        vars(scaler).update(state)


def _scaler(trainer: Trainer) -> Any:
    """DeepSpeed's own loss scaler, or accelerate's; None where losses are not scaled."""
    if trainer.args.fp16:
        return getattr(_inner(trainer.optimizer), "loss_scaler", None) or trainer.accelerator.scaler
    return None


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


def _folded(model: nn.Module) -> bool:
    config = secura_config(model)
    return config is not None and config.folded


def _base_weights(model: nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: layer.get_base_layer().weight for name, layer in secura_layers(model).items()}


def _inner(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper: torch's own, or DeepSpeed's ZeRO optimizer."""
    return getattr(optimizer, "optimizer", optimizer)

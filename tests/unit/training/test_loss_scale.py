"""The scale of float16 losses goes on where a checkpoint left it, with either of its two owners."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from secura_ds.training.state import _restore_loss_scale, loss_scale


def torch_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)


def deepspeed_scaler() -> DynamicLossScaler:
    return DynamicLossScaler(
        init_scale=1024.0,
        scale_window=2,
        min_scale=1,
        delayed_shift=1,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
        dtype=torch.float16,
    )


def trainer(scaler: Any, *, fp16: bool = True) -> Any:
    ours = isinstance(scaler, torch.amp.GradScaler)
    optimizer = SimpleNamespace() if ours else SimpleNamespace(loss_scaler=scaler)
    accelerator = SimpleNamespace(scaler=scaler if ours else None)
    return SimpleNamespace(args=SimpleNamespace(fp16=fp16), optimizer=optimizer, accelerator=accelerator)


def step(scaler: Any, *, overflow: bool) -> float:
    """One step's worth of the scaler's own rules; the scale after it."""
    if isinstance(scaler, DynamicLossScaler):
        scaler.update_scale(overflow)
        return float(scaler.cur_scale)
    parameter = torch.nn.Parameter(torch.ones(1))
    scaler.scale(parameter.sum() * (float("inf") if overflow else 1.0)).backward()
    scaler.step(torch.optim.SGD([parameter], lr=0.1))
    scaler.update()
    return float(scaler.get_scale())


@pytest.mark.parametrize("make", [torch_scaler, deepspeed_scaler])
def test_a_restored_scale_moves_as_the_one_it_was_taken_from(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)  # it says so when it lowers its scale
    one, other = make(), make()
    for overflow in (False, True, False):
        step(one, overflow=overflow)
    kept = json.loads(json.dumps(loss_scale(trainer(one))))
    _restore_loss_scale(trainer(other), kept)
    course = [False, False, True, False, False, False, True]
    expected = [step(one, overflow=overflow) for overflow in course]
    assert [step(other, overflow=overflow) for overflow in course] == expected
    fresh = make()
    assert [step(fresh, overflow=overflow) for overflow in course] != expected


def test_other_types_have_no_scale() -> None:
    assert loss_scale(trainer(torch_scaler(), fp16=False)) is None
    _restore_loss_scale(trainer(torch_scaler()), None)

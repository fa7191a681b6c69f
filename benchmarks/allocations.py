"""Counting the bytes of a training process: what the CPU allocator handed out, and what live tensors hold.

A step's peak is the census of live tensor storages when it begins plus the highest sum of the allocator's
events (PyTorch's profiler records each allocation and release) while it runs. Both count what was asked for,
not what the operating system has put behind it, and both are exact.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from secura_ds.plan import Work


@dataclass
class Measured:
    """Bytes of one process: what it holds between steps, by part, and the most it holds within one."""

    at_rest: dict[str, int] = field(default_factory=dict)
    step_peak: int = 0
    work: Work | None = None
    """The largest forward pass of the measured step."""

    @property
    def held(self) -> int:
        """Everything that is held between steps."""
        return sum(self.at_rest.values())


class Counter(TrainerCallback):
    """Measures one step of a run: the census just before it, the allocator's events during it.

    Args:
        before: addresses of storages that are not this run's, of `addresses()` before it began.
        step: which step, counted from 0; the third is the second that DeepSpeed runs with its full trace.
    """

    def __init__(self, trainer: Any, before: set[int], step: int = 2) -> None:
        self.trainer, self.before, self.step = trainer, before, step
        self.measured = Measured()
        self._profile: profile | None = None
        self._training_step = trainer.training_step
        trainer.training_step = self._watched_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the census and start to listen."""
        if state.global_step == self.step:
            self.measured.at_rest = census(self.trainer.model, self.trainer.optimizer, self.before)
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End listening: the optimizer has stepped."""
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            self.measured.step_peak = self.measured.held + highest_sum(events(self._profile))
            self._profile = None

    def _watched_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self._profile is not None:
            mask = inputs.get("attention_mask")
            padded = mask is not None and not bool(mask.all())
            learnt = int((inputs["labels"][:, 1:] != -100).sum())
            batch, length = inputs["input_ids"].shape
            work = Work(batch, length, learnt, padded, packed=mask is None)
            self.measured.work = max(self.measured.work or work, work)
        loss: Tensor = self._training_step(model, inputs, *args, **kwargs)
        return loss


def events(profiled: profile) -> list[int]:
    """The allocator's events in order: bytes taken, negative for bytes given back."""
    found = profiled.profiler.kineto_results.events()
    memory = [event for event in found if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]


def highest_sum(deltas: Iterable[int]) -> int:
    """The highest running sum, at least 0."""
    held = highest = 0
    for delta in deltas:
        held += delta
        highest = max(highest, held)
    return highest


def addresses() -> set[int]:
    """Where the storages lie that are alive now."""
    seen: set[int] = set()
    for tensor in _live_tensors():
        _new(tensor, seen)
    return seen


def census(model: nn.Module, optimizer: Any, before: set[int]) -> dict[str, int]:
    """Bytes of every live tensor storage, each counted once, by the part of a plan that it belongs to."""
    seen = set(before)
    parts = {
        part: sum(_new(tensor, seen) for tensor in tensors())
        for part, tensors in _parts(model, getattr(optimizer, "optimizer", optimizer)).items()
    }
    return {**parts, "other": sum(_new(tensor, seen) for tensor in _live_tensors())}


def _parts(model: nn.Module, optimizer: Any) -> dict[str, Callable[[], list[Tensor]]]:
    """Each part's tensors; a storage counts for the first that names it."""
    parameters: list[Any] = list(model.parameters())
    frozen = [p for p in parameters if not p.requires_grad]
    trained = [p for p in parameters if p.requires_grad]
    flat = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    masters = flat or getattr(optimizer, "single_partition_of_fp32_groups", [])
    buffers = dict(model.named_buffers())
    return {
        "frozen_weights": lambda: [getattr(p, "ds_tensor", p.data) for p in frozen],
        "adapter_weights": lambda: [getattr(p, "ds_tensor", p.data) for p in trained],
        "persistent_weights": lambda: [p.data for p in parameters],
        "quantization_constants": lambda: [t for p in frozen for t in _constants(p)],
        "adapter_buffers": lambda: [b for name, b in buffers.items() if ".secura_" in name],
        "model_buffers": lambda: list(buffers.values()),
        "fp32_masters": lambda: list(masters),
        "optimizer_state": lambda: _state(getattr(optimizer, "optimizer", optimizer)),
        "gradients": lambda: _present(
            getattr(optimizer, "grad_partitions_flat_buffer", None), *(p.grad for p in trained)
        ),
        "reduce_buckets": lambda: _buckets(optimizer),
    }


def _constants(parameter: Any) -> list[Tensor]:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    nested = state.state2 if state.nested else None
    return _present(state.absmax, state.code, state.offset, *((nested.absmax, nested.code) if nested else ()))


def _state(optimizer: Any) -> list[Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]


def _buckets(optimizer: Any) -> list[Tensor]:
    held = [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()]
    return _present(*(buffer for item in held for buffer in (item if isinstance(item, list) else [item])))


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _live_tensors() -> list[Tensor]:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at some deprecated objects warns
        return [o for o in gc.get_objects() if isinstance(o, Tensor) and o.device.type == "cpu"]


def _new(tensor: Tensor, seen: set[int]) -> int:
    """The bytes of the tensor's storage, 0 if it was counted before."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return 0
    address = storage.data_ptr()
    if address == 0 or address in seen:
        return 0
    seen.add(address)
    return storage.nbytes()

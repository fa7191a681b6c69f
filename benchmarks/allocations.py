"""Counting the bytes of a training process: what the CPU allocator handed out, and what live tensors hold.

A step's peak is the census of live tensor storages when it begins plus the highest sum of the allocator's
events (PyTorch's profiler records each allocation and release) while it runs. Both count what was asked for,
not what the operating system has put behind it, and both are exact.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback


@dataclass
class Measured:
    """Bytes of one process: what it holds between steps, by part, and the most it held within one."""

    between_steps: dict[str, int] = field(default_factory=dict)
    step_peak: int = 0
    """The most that was held at once during the measured step."""

    @property
    def held(self) -> int:
        """Everything that is held between steps."""
        return sum(self.between_steps.values())


class Counter(TrainerCallback):
    """Measures one step of a run: the census just before it, the allocator's events during it.

    Args:
        before: addresses of storages that are not this run's, of `addresses()` before it began.
        step: which step, counted from 0; the third is the first that DeepSpeed runs with its full trace.
    """

    def __init__(self, trainer: Any, before: set[int], step: int = 2) -> None:
        self.trainer, self.before, self.step = trainer, before, step
        self.measured = Measured()
        self._profile: profile | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the census and start to listen."""
        if state.global_step != self.step:
            return
        self.measured.between_steps = census(self.trainer.model, self.trainer.optimizer, self.before)
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End listening: the optimizer has stepped."""
        if self._profile is None or self.measured.step_peak:
            return
        self._profile.__exit__(None, None, None)
        self.measured.step_peak = self.measured.held + highest_sum(events(self._profile))
        self.last = self._profile
        self._profile = None


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
    """Bytes of every live tensor storage, each counted once, by the part of training it belongs to."""
    seen = set(before)
    parts: dict[str, int] = {}
    for part, tensors in _parts(model, optimizer).items():
        parts[part] = sum(_new(tensor, seen) for tensor in tensors())
    parts["other"] = sum(_new(tensor, seen) for tensor in _live_tensors())
    return parts


def _parts(model: nn.Module, optimizer: Any) -> dict[str, Callable[[], list[Tensor]]]:
    parameters = list(model.parameters())
    frozen = [p for p in parameters if not p.requires_grad]
    trained = [p for p in parameters if p.requires_grad]
    inner = getattr(optimizer, "optimizer", optimizer)
    return {
        "weights": lambda: _storages(frozen),
        "quantization constants": lambda: [t for p in frozen for t in _constants(p)],
        "adapter": lambda: _storages(trained),
        "adapter buffers": lambda: [b for n, b in model.named_buffers() if "secura_" in n],
        "model buffers": lambda: [b for n, b in model.named_buffers() if "secura_" not in n],
        "fp32 masters": lambda: [*_listed(inner, "fp32_partitioned_groups_flat"),
                                 *_listed(inner, "single_partition_of_fp32_groups")],
        "optimizer": lambda: _state(inner),
        "gradients": lambda: _present(
            getattr(inner, "grad_partitions_flat_buffer", None), *(p.grad for p in trained)
        ),
        "reduce bucket": lambda: _buckets(inner),
    }  # fmt: skip


def _storages(parameters: list[Any]) -> list[Tensor]:
    """A parameter's own storage and, where ZeRO-3 has cut it, the slice that this process keeps."""
    return [*(p.data for p in parameters), *(p.ds_tensor for p in parameters if hasattr(p, "ds_tensor"))]


def _constants(parameter: Any) -> list[Tensor]:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    found = [state.absmax, state.code, state.offset]
    if state.nested:
        found += [state.state2.absmax, state.state2.code]
    return [tensor for tensor in found if tensor is not None]


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _listed(optimizer: Any, name: str) -> list[Tensor]:
    return list(getattr(optimizer, name, []))


def _state(optimizer: Any) -> list[Tensor]:
    inner = getattr(optimizer, "optimizer", optimizer)
    return [v for state in inner.state.values() for v in state.values() if isinstance(v, Tensor)]


def _buckets(optimizer: Any) -> list[Tensor]:
    buckets = getattr(optimizer, "ipg_buckets", {})
    held = [getattr(bucket, "buffer", None) for bucket in buckets.values()]
    return [
        tensor
        for item in held
        for tensor in (item if isinstance(item, list) else [item])
        if tensor is not None
    ]


def _live_tensors() -> list[Tensor]:
    gc.collect()
    return [item for item in gc.get_objects() if isinstance(item, Tensor) and item.device.type == "cpu"]


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

"""One forward and backward pass on the meta device, with every allocation counted.

The real modules, the real autograd and the adapter's own code run; only the numbers are missing. So what is
saved for the backward pass, what checkpointing recomputes, every widening to fp32 and every buffer of W+ is
counted as it happens, for any architecture. A pass over the repeated layers is taken over a few of them and
unrolled to all: layers that are alike allocate alike.
"""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secura_ds.backbones.adapter import backbone_of
from secura_ds.plan import kernels
from secura_ds.plan.blueprint import decoder_layers
from secura_ds.plan.loss import forward_and_backward


class Work(NamedTuple):
    """One forward pass of a rank: `learnt` tokens of (batch, length) count for the loss."""

    batch: int
    length: int
    learnt: int
    padded: bool = True
    """Whether a row is shorter than the others, so that attention needs a mask."""
    packed: bool = False
    """Whether rows hold several examples."""


class Event(NamedTuple):
    """A point of the pass, and what happened until the next one.

    `kind` is "fetch" or "release" of a module's weights, or "" where nothing is; `phase` is "forward",
    "recompute" (a forward inside the backward pass) or "backward". `peak` and `change` are bytes above the
    level at this point.
    """

    kind: str
    module: str
    phase: str
    layer: int | None
    peak: int
    change: int


class Pass(NamedTuple):
    """A simulated forward and backward pass."""

    events: list[Event]
    offloaded: int
    """Bytes of activations that were moved to host memory."""


def simulate(
    model: nn.Module,
    work: Work,
    *,
    device: str,
    checkpointing: bool = False,
    offloading: bool = False,
    saves_inputs: bool = False,
    keeps_gradients: bool = True,
) -> Pass:
    """The events of one forward and backward pass of `model` (of `blueprint.draw`), through all its layers.

    Args:
        device: "cpu" or "cuda": whose kernels run.
        checkpointing: recompute each layer in the backward pass.
        offloading: keep saved activations in host memory.
        saves_inputs: ZeRO-3's linear layers keep their input, also where the weight is frozen.
        keeps_gradients: gradients stay where autograd put them, instead of going into DeepSpeed's buffers.
    """
    name, layers = decoder_layers(model)
    config = backbone_of(model).config
    kept = representatives(layers, getattr(config, "layer_types", None))
    tape, offloaded = _Tape(device, work), kernels.Offloaded()
    with ExitStack() as stack:
        stack.enter_context(_no_collector())
        stack.enter_context(_layers(model, name, [layers[i] for i in kept]))
        stack.enter_context(_checkpointing(backbone_of(model), checkpointing))
        stack.enter_context(kernels.of_device(device, saves_inputs=saves_inputs))
        stack.enter_context(_observed(model, name, tape))
        stack.enter_context(tape)
        if offloading:
            stack.enter_context(offloaded)
        if not keeps_gradients:
            stack.enter_context(_without_gradients(model))
        tape.knows([*model.parameters(), *model.buffers()])
        forward_and_backward(model, work, device, tape.mark)
        tape.mark("", "", "backward")
    for parameter in model.parameters():
        parameter.grad = None
    return Pass(unrolled(tape.events, kept, len(layers)), offloaded.host_bytes * len(layers) // len(kept))


@contextmanager
def _no_collector() -> Iterator[None]:
    """Python's cycle collector would free at a moment of its own choosing."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    trained = [p for p in model.parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(drop) for p in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def representatives(layers: nn.ModuleList, kinds: Sequence[str] | None) -> list[int]:
    """The fewest layers whose pass tells that of all: the first, a middle and the last period of them."""
    signatures = [_signature(layer, kinds[i] if kinds else "") for i, layer in enumerate(layers)]
    count = len(signatures)
    for period in range(1, count // 3 + 1):
        if count % period == 0 and all(signatures[i] == signatures[i % period] for i in range(count)):
            return [*range(2 * period), *range(count - period, count)]
    return list(range(count))


def _signature(layer: nn.Module, kind: str) -> tuple[Any, ...]:
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return (kind, *((n, tuple(t.shape), t.dtype, t.requires_grad) for n, t in tensors))


def unrolled(events: Sequence[Event], kept: Sequence[int], count: int) -> list[Event]:
    """The events of `count` layers from those of the layers `kept` by `representatives`."""
    if len(kept) == count:
        return list(events)
    period = len(kept) // 3
    result: list[Event] = []
    at = 0
    while at < len(events):
        layer, end = events[at].layer, at
        while end < len(events) and (events[end].layer is None) == (layer is None):
            end += 1
        run = events[at:end]
        at = end
        if layer is None:
            result += run
            continue
        by_layer: dict[int, list[Event]] = {}
        for event in run:
            assert event.layer is not None
            by_layer.setdefault(event.layer, []).append(event)
        order = range(count) if next(iter(by_layer)) == 0 else range(count - 1, -1, -1)
        for target in order:
            if target >= count - period:
                source = target - (count - period) + 2 * period
            else:
                source = target if target < period else period + (target - period) % period
            for event in by_layer[source]:
                path = re.sub(rf"\.{source}(?=\.|$)", f".{target}", event.module, count=1)
                result.append(event._replace(module=path, layer=target))
    return result


class _Tape(TorchDispatchMode):
    """Counts live storages while operators run, cut into events at every `mark`."""

    def __init__(self, device: str, work: Work) -> None:
        super().__init__()
        self.device, self.work = device, work
        self.events: list[Event] = []
        self.layer: int | None = None
        self._live = self._peak = self._level = 0
        self._seen: dict[int, int] = {}
        self._open: tuple[str, str, str, int | None] | None = None

    def knows(self, tensors: Sequence[Tensor]) -> None:
        """Leave these out of the count: they are there all the time."""
        self._seen.update((tensor.untyped_storage()._cdata, 0) for tensor in tensors)

    def mark(self, kind: str, module: str, phase: str) -> None:
        """Close the event that is open, and open the next."""
        if self._open is not None:
            self.events.append(Event(*self._open, self._peak - self._level, self._live - self._level))
        self._open = (kind, module, phase, self.layer)
        self._level = self._peak = self._live

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (known := kernels.without_values(function, args, self.work)) is not None:
            return self._noted(known)
        extra = kernels.workspace(function, args, self.device)
        if extra:
            self._peak = max(self._peak, self._live + extra)
        result = self._noted(function(*args, **(kwargs or {})))
        self._peak = max(self._peak, self._live + extra)
        return result

    def _noted(self, result: Any) -> Any:
        for item in tree_leaves(result):
            if isinstance(item, Tensor):
                self._note(item)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            size = self._seen[key] = kernels.rounded(storage.nbytes(), self.device)
            self._live += size
            self._peak = max(self._peak, self._live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._live -= self._seen.pop(key)


class _Mark(torch.autograd.Function):
    """The identity, which calls back when its gradient passes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, callback: Callable[[], None]) -> Tensor:
        ctx.callback = callback
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.callback()
        return gradients[0], None


@contextmanager
def _observed(model: nn.Module, layers_name: str, tape: _Tape) -> Iterator[None]:
    """Mark where ZeRO-3 fetches and releases each module's weights, and where layers begin and end.

    Every module counts, also one without weights: whenever one begins, ZeRO-3 gathers ahead.
    """
    handles = []
    for name, module in model.named_modules():
        is_layer = name.rpartition(".")[0] == layers_name
        handles += _observe(module, name, int(name.rpartition(".")[2]) if is_layer else None, tape)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observe(module: nn.Module, name: str, index: int | None, tape: _Tape) -> list[Any]:
    def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        # Recomputed in the backward pass, a layer is still the one whose backward began.
        if index is not None:
            tape.layer = index
        tape.mark("fetch", name, _forward_phase())
        passed = _passing(args, after_backward)
        return passed, kwargs if passed is not args else _passing(kwargs, after_backward)

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        tape.mark("release", name, _forward_phase())
        if index is not None and _forward_phase() == "forward":
            tape.layer = None
        return _passing(output, before_backward)

    def before_backward() -> None:
        if index is not None:
            tape.layer = index
        tape.mark("fetch", name, "backward")

    def after_backward() -> None:
        tape.mark("release", name, "backward")
        if index is not None:
            tape.layer = None

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]


def _passing(values: Any, callback: Callable[[], None]) -> Any:
    """`values` with a callback on the gradient of its first tensor that has one; itself if none has."""
    if isinstance(values, Tensor):
        return _Mark.apply(values, callback) if values.requires_grad else values
    if isinstance(values, tuple):
        for at, value in enumerate(values):
            if (passed := _passing(value, callback)) is not value:
                return (*values[:at], passed, *values[at + 1 :])
    if isinstance(values, dict):
        for key, value in values.items():
            if isinstance(value, Tensor) and value.requires_grad:
                changed = copy.copy(values)
                changed[key] = _Mark.apply(value, callback)
                return changed
    return values


def _forward_phase() -> str:
    return "forward" if torch._C._current_graph_task_id() == -1 else "recompute"


def reads(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module's own forward reads, as ZeRO-3 gathers them for it, by name in it."""
    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, nn.ParameterDict | nn.ParameterList):
        return {}  # never called: whoever holds it reads them
    configs = getattr(module, "configs", None)
    if configs is not None and hasattr(module, "secura_A"):
        own |= {f"secura_{k}.{n}": p for k in "AB" for n, p in getattr(module, f"secura_{k}").items()}
        if any(config.apply == "forward" for config in configs.values()):
            own |= {f"base_layer.{n}": p for n, p in module.get_base_layer().named_parameters(recurse=False)}
    return own


@contextmanager
def _layers(model: nn.Module, name: str, layers: list[nn.Module]) -> Iterator[None]:
    """Inside the block the model has these layers only."""
    parent, _, attribute = name.rpartition(".")
    owner, config = model.get_submodule(parent), backbone_of(model).config
    whole = getattr(owner, attribute)
    setattr(owner, attribute, nn.ModuleList(layers))
    try:
        with mock.patch.object(config, "num_hidden_layers", len(layers)):
            yield
    finally:
        setattr(owner, attribute, whole)


@contextmanager
def _checkpointing(base: Any, wanted: bool) -> Iterator[None]:
    if wanted:
        base.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if wanted:
            base.activation_checkpointing_disable()

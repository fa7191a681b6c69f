"""DeepSpeed settings under which a rank's part of a weight is not what a fold or a merge takes it for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from secura_ds.errors import UserError


class _Unsupported(NamedTuple):
    """A setting by its place, the values of it that cannot work, why, and what to write instead."""

    place: str
    applies: Callable[[Any], bool]
    reason: str
    remedy: str


def _is_nvme(value: Any) -> bool:
    return str(value).lower() == "nvme"


def _is_on(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _is_several(value: Any) -> bool:
    return isinstance(value, int) and value > 1


_ROUNDED = "so the weights that train would not be the weights that are folded and merged"
_CUT = "while rows, columns and the largest ratio are those of the whole weight"
_ZERO = "zero_optimization"
_UNSUPPORTED = (
    _Unsupported(
        f"{_ZERO}.offload_param.device",
        _is_nvme,
        "weights are folded, saved and measured where they lie, which must be memory",
        'use "cpu"',
    ),
    _Unsupported(
        f"{_ZERO}.offload_optimizer.device",
        _is_nvme,
        "checkpoints hold the optimizer's state by parameter, which is read and restored in memory",
        'use "cpu"',
    ),
    _Unsupported(
        f"{_ZERO}.zero_quantized_weights",
        _is_on,
        f"ZeRO++ would round weights to 8 bits whenever they are gathered, {_ROUNDED}",
        "remove it",
    ),
    _Unsupported(
        f"{_ZERO}.zero_quantized_nontrainable_weights",
        _is_on,
        f"ZeRO++ would keep frozen weights in 8 bits that change with the number of ranks, {_ROUNDED}",
        'remove it and set backbone.quantization to {"kind": "nf4"}',
    ),
    _Unsupported(
        f"{_ZERO}.zero_quantized_gradients",
        _is_on,
        "ZeRO++ would round gradients to a few bits on their way, and those of an adapter are small anyway",
        "remove it",
    ),
    _Unsupported(
        f"{_ZERO}.zero_hpz_partition_size",
        _is_several,
        "ZeRO++ would keep a second copy of the weights in each node, which a fold would leave out of date",
        "remove it",
    ),
    _Unsupported(
        f"{_ZERO}.mics_shard_size",
        _is_on,
        f"MiCS would cut weights among some of the ranks only, {_CUT}",
        "remove it",
    ),
    _Unsupported(
        f"{_ZERO}.mics_hierarchical_params_gather",
        _is_on,
        f"MiCS would cut weights among some of the ranks only, {_CUT}",
        "remove it",
    ),
    _Unsupported(
        "tensor_parallel.autotp_size",
        _is_several,
        f"tensor parallelism would give each rank rows or columns as a weight of its own, {_CUT}",
        "remove tensor_parallel; ZeRO-3 shards the weights",
    ),
    _Unsupported(
        "tensor_parallel.tp.tp_size",
        _is_several,
        f"tensor parallelism would give each rank rows or columns as a weight of its own, {_CUT}",
        "remove tensor_parallel; ZeRO-3 shards the weights",
    ),
)


def refuse_unsupported(settings: Mapping[str, Any], path: str) -> None:
    """Refuse a DeepSpeed configuration that changes what a rank's part of a weight is.

    Args:
        settings: the configuration, as in its JSON file.
        path: where it was read, for the message.

    Raises:
        UserError: names every such setting, with its value, the reason and the remedy.
    """
    found = []
    for place, applies, reason, remedy in _UNSUPPORTED:
        value = _at(settings, place)
        if applies(value):
            found.append(f"{place} is {value!r}: {reason}; {remedy}")
    if found:
        raise UserError(f"{path}: {'. '.join(found)}")


def _at(settings: Any, place: str) -> Any:
    for key in place.split("."):
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    return settings

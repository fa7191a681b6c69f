"""The state of an optimizer, whole and by parameter name, whoever owns it: torch or DeepSpeed ZeRO 1 to 3.

Whole tensors by name can be read back by any number of ranks. Every function is collective under DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from secura_ds.sharding.partition import is_sharded, slice_of

Numbers = dict[str, float | int | bool]


def master(parameter: Parameter) -> Tensor:
    """The whole fp32 master of a trained parameter; the parameter itself where there is none."""
    if is_sharded(parameter) or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        gathered: Tensor = safe_get_full_fp32_param(parameter)
        return gathered
    return parameter.detach()


def optimizer_state(
    optimizer: Any, parameters: Mapping[str, Parameter], *, keep: bool = True
) -> tuple[dict[str, Tensor], Numbers]:
    """What the optimizer remembers of each parameter.

    Args:
        optimizer: a torch optimizer, or DeepSpeed's ZeRO optimizer.
        parameters: the trained parameters by name; on every rank the same, in the same order.
        keep: False on ranks that only take part; what they get is of no use.

    Returns:
        tensors under `<name>/<key>` on the CPU, and plain numbers under the same names (such as the step).
        Both empty before the first step.
    """
    flat = _flat_parameters(optimizer)
    if flat is None:
        return _torch_state(optimizer, parameters)
    state = optimizer.optimizer.state
    if not any(state.get(part) for part in flat):
        return {}, {}
    from deepspeed.utils import safe_get_full_optimizer_state

    _link(optimizer)
    example, size = next((state[part], part.numel()) for part in flat if state.get(part))
    tensors: dict[str, Tensor] = {}
    numbers: Numbers = {}
    for key, value in example.items():
        if isinstance(value, Tensor) and value.numel() == size:
            for name, parameter in parameters.items():
                gathered = safe_get_full_optimizer_state(parameter, key)
                if keep:
                    tensors[f"{name}/{key}"] = gathered.to("cpu", copy=True)
        else:
            numbers.update({f"{name}/{key}": _number(value) for name in parameters})
    return tensors, numbers


def load_optimizer_state(
    optimizer: Any, parameters: Mapping[str, Parameter], tensors: Mapping[str, Tensor], numbers: Numbers
) -> None:
    """Give the optimizer the state that `optimizer_state` returned, from any number of ranks."""
    if not tensors and not numbers:
        return
    flat = _flat_parameters(optimizer)
    if flat is None:
        _load_torch_state(optimizer, parameters, tensors, numbers)
        return
    name = next(iter(parameters))
    keys = [key.removeprefix(f"{name}/") for key in tensors if key.startswith(f"{name}/")]
    scalars = {key.removeprefix(f"{name}/"): v for key, v in numbers.items() if key.startswith(f"{name}/")}
    fused = any(group.get("fused") for group in optimizer.optimizer.param_groups)
    for part in flat:
        state: dict[str, Any] = {key: torch.zeros_like(part) for key in keys}
        device = part.device if fused else "cpu"
        # torch counts steps in a tensor, DeepSpeed's own optimizers in an integer.
        state.update(
            (k, torch.tensor(v, device=device) if isinstance(v, float) else v) for k, v in scalars.items()
        )
        optimizer.optimizer.state[part] = state
    _link(optimizer)
    for name, parameter in parameters.items():
        for key in keys:
            _set_state(parameter, key, tensors[f"{name}/{key}"])


def _link(optimizer: Any) -> None:
    """Have ZeRO-1 and 2 point every parameter at its part of the state.

    DeepSpeed does so after the first step of the first group, when the other groups have no state yet.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _flat_parameters(optimizer: Any) -> list[Tensor] | None:
    """DeepSpeed's flattened fp32 partitions, one per group, that its inner optimizer works on."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return None


def _set_state(parameter: Parameter, key: str, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    value = value.to(parameter.device)
    if is_sharded(parameter):
        safe_set_local_optimizer_state(parameter, slice_of(parameter, value), key)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _torch_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter]
) -> tuple[dict[str, Tensor], Numbers]:
    tensors: dict[str, Tensor] = {}
    numbers: Numbers = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dim() > 0:
                tensors[f"{name}/{key}"] = value.detach().to("cpu", copy=True)
            elif value is not None:
                numbers[f"{name}/{key}"] = _number(value)
    return tensors, numbers


def _load_torch_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Parameter],
    tensors: Mapping[str, Tensor],
    numbers: Numbers,
) -> None:
    names = {id(parameter): name for name, parameter in parameters.items()}
    whole_state = optimizer.state_dict()
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    given: dict[str, dict[str, Any]] = {name: {} for name in order}
    for place, value in tensors.items():
        name, key = place.rsplit("/", 1)
        given[name][key] = value
    for place, number in numbers.items():
        name, key = place.rsplit("/", 1)
        given[name][key] = torch.tensor(number) if isinstance(number, float) else number
    whole_state["state"] = {index: given[name] for index, name in enumerate(order) if given[name]}
    optimizer.load_state_dict(whole_state)


def _number(value: Any) -> float | int | bool:
    number = value.item() if isinstance(value, Tensor) else value
    return number if isinstance(number, bool | int) else float(number)

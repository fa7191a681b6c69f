"""bitsandbytes 4-bit weights: telling them apart, reading them dequantized, and keeping them exact."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from secura_ds.sharding.partition import gathered, is_available, is_sharded


def is_packed(weight: object) -> bool:
    """True for a bitsandbytes 4-bit parameter, gathered or not."""
    return type(weight).__name__ == "Params4bit"


def is_quantized(module: nn.Module) -> bool:
    """True for a bitsandbytes 4-bit linear layer."""
    return is_packed(getattr(module, "weight", None))


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype a linear layer computes in: its weight's, or a 4-bit layer's compute dtype."""
    if not is_quantized(module):
        return module.weight.dtype
    return module.compute_dtype or module.weight.quant_state.dtype


def dequantized(module: nn.Module) -> Tensor:
    """The whole weight (out, in) of a `Linear` or `Linear4bit` in its compute dtype, detached.

    Of a plain layer it is the weight itself, not a copy; of a sharded one that must be gathered, a copy.
    """
    weight: Parameter = module.weight
    borrowed = is_sharded(weight) and not is_available(weight)
    with gathered(weight):
        if not is_quantized(module):
            return weight.detach().clone() if borrowed else weight.detach()
        return _unpack(weight).to(compute_dtype(module))


def _unpack(weight: Parameter) -> Tensor:
    import bitsandbytes as bnb

    return bnb.functional.dequantize_4bit(*_portable(weight.data, weight.quant_state))


def _portable(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Packed data and its constants in the format that all devices share."""
    if not getattr(state, "packing_format_for_cpu", False):
        return data, state
    import bitsandbytes as bnb

    # The conversion back edits the state it is given, and the layer still computes with its own.
    data, state = bnb.nn.modules._convert_weight_packed_for_cpu_inverse(data, copy.deepcopy(state))
    return data, state


def packed_bytes(stored: Tensor, state: Any) -> tuple[Tensor, Any]:
    """The packed numbers, or a rank's part of them, as flat bytes of two weights each, and the constants."""
    data, state = _portable(stored, state)
    return data.view(-1).view(torch.uint8), state


def unpack_part(packed: Tensor, state: Any, start: int, low: int, high: int) -> Tensor:
    """Elements [low, high) of a weight, dequantized to the dtype it was quantized from, on `state`'s device.

    They are the bits that dequantizing the whole weight gives; memory is that of the elements asked for.

    Args:
        packed: bytes of two weights each, the first of them element `start`, which is even.
        state: bitsandbytes' constants of the *whole* weight.
    """
    import bitsandbytes as bnb

    # Constants belong to blocks of elements; what a block has on other ranks stays 0.
    size = state.blocksize
    first, last = low // size, -(-high // size)
    begin = max(first * size, start)
    data = torch.zeros((last - first) * size // 2, dtype=torch.uint8, device=state.absmax.device)
    part = packed[(begin - start) // 2 : (last * size - start) // 2]
    data[(begin - first * size) // 2 :][: len(part)] = part
    own = bnb.functional.QuantState(
        absmax=_constants(state, first, last),
        # One flat row: with several, bitsandbytes' CPU kernel goes astray unless blocks end where rows do.
        shape=(2 * len(data),),
        code=state.code,
        blocksize=size,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    values: Tensor = bnb.functional.dequantize_4bit(data.view(-1, 1), own).view(-1)
    return values[low - first * size : high - first * size]


def _constants(state: Any, first: int, last: int) -> Tensor:
    """The largest magnitude of each block [first, last), fp32; in double quantization it is 8-bit itself."""
    if not state.nested:
        return state.absmax[first:last].float()
    import bitsandbytes as bnb

    size = state.state2.blocksize
    start = first // size * size
    constants = bnb.functional.dequantize_blockwise(
        state.absmax[start:last],
        absmax=state.state2.absmax[start // size : -(-last // size)],
        code=state.state2.code,
        blocksize=size,
    )
    constants += state.offset
    return constants[first - start :].float()


def keep_exact(model: nn.Module) -> None:
    """Stop 4-bit layers from repacking themselves in evaluation on CPUs.

    bitsandbytes' packed CPU format rounds the quantization constants to bf16 and has no backward pass: one
    evaluation would change the weights and the training after it would get no gradient.
    """
    for module in model.modules():
        if is_quantized(module):
            module.support_avx512bf16_for_cpu = False
            weight: Parameter = module.weight
            if getattr(weight.quant_state, "packing_format_for_cpu", False):
                import bitsandbytes as bnb

                unpack = bnb.nn.modules._convert_weight_packed_for_cpu_inverse
                weight.data, weight.quant_state = unpack(weight.data, weight.quant_state)


def quantized_parameter(module: nn.Module, weight: Tensor, device: torch.device) -> Parameter:
    """`weight` (out, in) quantized as the 4-bit layer `module` prescribes, packed on `device`."""
    import bitsandbytes as bnb

    old: Parameter = module.weight
    settings = {
        k: getattr(old, k) for k in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    }
    new = bnb.nn.Params4bit(weight.detach(), requires_grad=False, module=module, **settings)
    quantized: Parameter = new.to(device)
    return quantized


def requantize(module: nn.Module, weight: Tensor) -> None:
    """Replace the 4-bit weight of an unsharded layer by a new parameter holding `weight` quantized anew."""
    module.weight = quantized_parameter(module, weight.to("cpu"), module.weight.device)


def restore_quantized(module: nn.Module, weight: Parameter) -> None:
    """Put back the 4-bit parameter that `requantize` replaced."""
    module.weight = weight
    module.quant_state = weight.quant_state

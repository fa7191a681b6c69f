"""This rank's part of one weight, whatever holds it (method.md section 6).

A plain tensor, a ZeRO-3 partition, a bitsandbytes 4-bit weight and a 4-bit weight under ZeRO-3 look alike
here: elements [start, end) of the row-major flattened weight (out, in), read and written piece by piece.
Where DeepSpeed keeps partitions on the CPU they are read from and written there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secura_ds.errors import UserError
from secura_ds.sharding.partition import is_available, is_sharded, settle
from secura_ds.sharding.quantized import is_packed, packed_bytes, unpack_part


class Slice:
    """Elements [start, end) of the flattened weight, without the padding behind the last one.

    Attributes:
        shape: of the whole weight, (out, in).
        group: the process group whose ranks hold the other slices; None where this one is all of it.
    """

    def __init__(self, weight: Tensor) -> None:
        self.shape = torch.Size(getattr(weight, "ds_shape", weight.shape))
        self.group: Any = weight.ds_process_group if is_sharded(weight) else None
        self._weight, self._values = weight, _stored(weight)
        self._place(self._values.numel(), self.shape.numel())

    def _place(self, size: int, num_elements: int) -> None:
        rank = self._weight.ds_zero_partition_rank if self.group is not None else 0
        self.start = min(size * rank, num_elements)
        self.end = min(self.start + size, num_elements)

    def read(self, low: int, high: int, out: Tensor) -> Tensor:
        """Elements [low, high) in the dtype and on the device of `out` (high - low,), which may hold them.

        Read only: where nothing has to be converted it is the weight itself.
        """
        values = self._values[low - self.start : high - self.start]
        return values if (values.dtype, values.device) == (out.dtype, out.device) else out.copy_(values)

    def write(self, low: int, high: int, values: Tensor) -> None:
        """Replace elements [low, high), rounded to the weight's dtype."""
        self._values[low - self.start : high - self.start].copy_(values)

    def written(self) -> None:
        """Drop the whole copy that ZeRO-3 keeps of a persistent or still gathered weight: it is out of date.

        Whoever needs the whole weight next gathers it from the slices. Collective in that the ranks' copies
        must go together, but nothing is sent.
        """
        if self.group is not None and is_available(self._weight):
            self._weight.partition()


class PackedSlice(Slice):
    """The same of a bitsandbytes 4-bit weight: elements are dequantized as they are read.

    The quantization constants are whole on every rank; ZeRO-3 cuts the packed numbers only.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self._values, self._state = packed_bytes(self._values, weight.quant_state)
        self.shape = torch.Size(self._state.shape)
        self._place(2 * self._values.numel(), self.shape.numel())

    def read(self, low: int, high: int, out: Tensor) -> Tensor:
        """Elements [low, high), dequantized, in the dtype and on the device of `out`."""
        return out.copy_(unpack_part(self._values, self._state, self.start, low, high))

    def write(self, low: int, high: int, values: Tensor) -> None:
        """Always refuse: an update smaller than a quantization step would vanish."""
        raise UserError("a 4-bit weight cannot be rewritten in place: use strategy 'M2'")


def local_slice(weight: Tensor) -> Slice:
    """This rank's slice of `weight`; all of it where nothing is sharded.

    Raises:
        UserError: the slices are not in memory, or are stored twice or quantized by DeepSpeed.
    """
    return PackedSlice(weight) if is_packed(weight) else Slice(weight)


def _stored(weight: Tensor) -> Tensor:
    """What this rank stores of `weight`, flat."""
    if not is_sharded(weight):
        return weight.detach().view(-1)
    if weight.ds_tensor.status.name != "AVAILABLE":
        raise UserError(
            "a weight's slices are on NVMe, where M1 cannot fold: use strategy 'M2' or offload to CPU"
        )
    if weight.ds_secondary_tensor is not None or hasattr(weight.ds_tensor, "ds_quant_scale"):
        raise UserError(
            "weights that DeepSpeed keeps twice (zero_hpz_partition_size) or quantized "
            "(zero_quantized_nontrainable_weights) cannot be folded or measured: turn those off"
        )
    # A gather that has begun would end with the weight as it was.
    settle([weight])
    values: Tensor = weight.ds_tensor.data
    return values

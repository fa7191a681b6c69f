"""What the meta device lacks: which kernels a real device would run, and what they allocate inside."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from secura_ds.adapter import restrained

if TYPE_CHECKING:
    from secura_ds.plan.simulation import Work

aten = torch.ops.aten

CUDA_BLOCK = 512  # PyTorch's CUDA allocator hands out multiples of it
LIBRARY_WORKSPACES = 33 * 2**20  # cuBLAS, through PyTorch's allocator (8 MiB before Hopper)
PACKED = 2**17  # bytes of both sides that oneDNN packs at a time in half-precision products, in one thread
MIN_OFFLOADED = 1024  # bytes of the smallest tensor that activation offloading moves
STASH = 5  # tensors on their way to host memory
FLASH_ROWS = 128  # flash attention's backward pass pads lengths to multiples of it


def rounded(size: int, device: str) -> int:
    """The bytes that an allocation of `size` takes."""
    return math.ceil(size / CUDA_BLOCK) * CUDA_BLOCK if device == "cuda" else size


def without_values(function: Any, args: tuple[Any, ...], work: Work) -> Any:
    """What an operator returns that depends on values, which there are none of; None for all others."""
    if function is aten._local_scalar_dense.default:
        # Asked is whether all are attended to: yes where no row is padded, and packed rows are what they are.
        return not (work.padded or work.packed)
    if function is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
        return args[0].new_empty(work.learnt, *args[0].shape[args[1][0].dim() :])
    if function is aten._index_put_impl_.default:
        return args[0]
    return None


def workspace(function: Any, args: tuple[Any, ...], device: str) -> int:
    """Bytes that a kernel allocates and frees inside, beyond what it returns."""
    name = function.name()
    if name == "bitsandbytes::gemm_4bit":
        # Batches of training: the weight is dequantized and multiplied, its constants widened before.
        x, (rows, columns) = args[0], args[2]
        weight = rows * columns * x.dtype.itemsize
        return int(weight + 4 * rows * columns / args[4] + _packed(x.nbytes + weight, x.dtype, device))
    if name in ("aten::mm", "aten::addmm", "aten::bmm"):
        left, right = args[-2:]
        return _packed(left.nbytes + right.nbytes, left.dtype, device)
    if name == "aten::_scaled_dot_product_flash_attention_backward":
        _, query, key = args[:3]
        batch, heads, length, width = query.shape
        padded = math.ceil(length / FLASH_ROWS) * FLASH_ROWS
        sums = 4 * batch * heads * padded * (width + 1)
        expanded = 2 * batch * heads * key.shape[2] * width * key.element_size()
        return int(sums + (expanded if heads != key.shape[1] else 0))
    if name == "aten::_scaled_dot_product_efficient_attention_backward":
        query = args[1]
        return int(4 * query.numel() + 4 * query.numel() / query.shape[-1])
    return 0


def _packed(operands: int, dtype: torch.dtype, device: str) -> int:
    """What a CPU's product in half precision copies of its operands at a time."""
    return min(operands, PACKED) if device == "cpu" and dtype != torch.float32 else 0


@contextmanager
def of_device(device: str, *, saves_inputs: bool) -> Iterator[None]:
    """Inside the block, operators on the meta device take the path of `device`."""
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch("torch.autocast", _autocast(torch.autocast)))
        enter(mock.patch("torch.is_autocast_enabled", lambda *_: False))
        enter(mock.patch("torch.nn.functional.scaled_dot_product_attention", _attention(device)))
        enter(mock.patch.object(restrained, "block_grid", _grid(device)))
        if saves_inputs:
            enter(mock.patch("torch.nn.functional.linear", _linear))
        yield


def _autocast(real: Any) -> Any:
    """`torch.autocast` that takes the meta device, too: nothing is cast there."""

    class Autocast(real):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    return Autocast


def _attention(device: str) -> Any:
    """Scaled dot product attention by the fused kernel that the device takes."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        mask = attn_mask
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.new_empty(mask.shape, dtype=query.dtype)  # every kernel adds its mask
        if device == "cpu":
            result: tuple[Tensor, ...] = aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale
            )
        elif mask is None and query.shape[-1] <= 256 and query.dtype != torch.float32:
            result = aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )
        else:
            if mask is not None:
                mask = mask.expand(*query.shape[:-1], mask.shape[-1])
            result = aten._scaled_dot_product_efficient_attention(
                query, key, value, mask, True, dropout_p, is_causal, scale=scale
            )
        return result[0]

    return attention


def _grid(device: str) -> Any:
    """The row blocks of W+ on `device`; two of a CPU's many, which take the memory of all."""
    real = restrained.block_grid

    def grid(num_rows: int, num_columns: int, _device: str) -> list[slice]:
        blocks: list[slice] = real(num_rows, num_columns, device)
        return blocks[:2] if device == "cpu" else blocks

    return grid


class _ZeroLinear(torch.autograd.Function):
    """What ZeRO-3 makes of `F.linear`: weight and input are saved, whether or not the weight is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        if x.dim() == 2 and bias is not None:
            return torch.addmm(bias, x, weight.t())
        y = x.matmul(weight.t())
        if bias is not None:
            y += bias
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, weight, _ = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = dy.matmul(weight) if needs_x else None
        flat = dy.reshape(-1, dy.shape[-1])
        dweight = flat.t().matmul(x.reshape(-1, x.shape[-1])) if needs_weight else None
        return dx, dweight, flat.sum(0) if needs_bias else None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = _ZeroLinear.apply(x, weight, bias)
    return y


class Offloaded(saved_tensors_hooks):
    """Saved activations in host memory: only the latest ones and small ones stay on the device."""

    def __init__(self) -> None:
        self.host_bytes = 0
        """All that was moved in one pass."""
        self._stash: deque[Tensor] = deque(maxlen=STASH)
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        size = tensor.numel() * tensor.element_size()
        if isinstance(tensor, nn.Parameter) or size < MIN_OFFLOADED or tensor.device.type != "meta":
            return tensor
        self.host_bytes += size
        self._stash.append(tensor)
        return tensor.shape, tensor.stride(), tensor.dtype

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._stash.clear()
        shape, stride, dtype = packed
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

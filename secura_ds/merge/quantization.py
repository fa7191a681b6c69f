"""The weight that 4-bit training saw: NF4 there and back, one tensor at a time on the CPU, in bounded memory.

bitsandbytes quantizes a whole tensor through several fp32 copies of it. Blocks of 64 weights are independent,
so the same kernels run here on chunks; only the block maxima (1/64 of the weights) are quantized whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secura_ds.errors import UserError, shown

BLOCK_SIZE = 64
CHUNK = 2**20


@dataclass(frozen=True)
class Quantization:
    """How the frozen weights were held in training.

    Attributes:
        double: the block maxima were quantized too.
        dtype: the dtype weights had before quantization and after dequantization.
    """

    double: bool
    dtype: torch.dtype

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str) -> Quantization:
        """Read a bitsandbytes `quantization_config` as an adapter records it.

        Raises:
            UserError: it is not NF4, so the trained weight cannot be reproduced.
        """
        kind = config.get("bnb_4bit_quant_type")
        if not config.get("load_in_4bit") or kind != "nf4":
            raise UserError(
                f"{where}: the base was quantized as {shown(kind or config)}, only nf4 can be reproduced"
            )
        name = str(config.get("bnb_4bit_compute_dtype", "bfloat16")).removeprefix("torch.")
        if name not in ("bfloat16", "float16", "float32"):
            raise UserError(f"{where}: bnb_4bit_compute_dtype is {shown(name)}, which is no type of weights")
        return cls(bool(config.get("bnb_4bit_use_double_quant")), getattr(torch, name))

    def round_trip(self, weight: Tensor) -> Tensor:
        """`weight` quantized to NF4 and dequantized, in `weight.dtype`; overwrites and returns `weight`.

        Equal to what `bitsandbytes.nn.Linear4bit` dequantizes to on CPUs; a GPU may round a tie differently.
        """
        from bitsandbytes import functional

        flat = weight.view(-1)
        spans = [slice(start, min(start + CHUNK, len(flat))) for start in range(0, len(flat), CHUNK)]
        packed, maxima = [], []
        for span in spans:
            codes, state = functional.quantize_4bit(
                flat[span].to(self.dtype), blocksize=BLOCK_SIZE, quant_type="nf4"
            )
            packed.append(codes)
            maxima.append(state.absmax)
        absmax = torch.cat(maxima)
        if self.double:
            offset = absmax.mean()
            absmax = functional.dequantize_blockwise(
                *functional.quantize_blockwise(absmax - offset, blocksize=256)
            )
            absmax += offset
        for span, codes in zip(spans, packed, strict=True):
            blocks = absmax[span.start // BLOCK_SIZE : -(-span.stop // BLOCK_SIZE)]
            state = functional.QuantState(
                absmax=blocks,
                shape=torch.Size([span.stop - span.start]),
                dtype=self.dtype,
                blocksize=BLOCK_SIZE,
                quant_type="nf4",
                code=functional.get_4bit_type("nf4", device="cpu"),
            )
            flat[span] = functional.dequantize_4bit(codes, state).view(-1).to(weight.dtype)
        return weight

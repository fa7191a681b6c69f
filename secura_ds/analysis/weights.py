"""Adapted weights before and after, streamed from disk: one layer is held at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from secura_ds.checkpoint_files import Checkpoint
from secura_ds.merge.adapter_file import AdapterFile
from secura_ds.merge.edits import plan_edits


class AdaptedWeight(NamedTuple):
    """One weight (out, in) in fp32: as training first saw it (dequantized, after 4-bit training), and W+."""

    module: str
    before: Tensor
    after: Tensor


def adapted_weights(base: Checkpoint, adapter: AdapterFile) -> Iterator[AdaptedWeight]:
    """Every layer that the adapter adapts, in the adapter's order.

    In fp32 throughout: a merge rounds to the checkpoint's dtype, which could hide a small update.

    Raises:
        UserError: adapter and base do not belong together, or a tensor is not finite.
    """
    edits = plan_edits(base, adapter, "trained")
    for module in adapter.modules:
        stored = base.tensors[f"{module}.weight"]
        yield AdaptedWeight(
            module, trained_weight(base, adapter, module), edits[stored.name](stored.read().float())
        )


def trained_weight(base: Checkpoint, adapter: AdapterFile, module: str) -> Tensor:
    """A layer's weight (out, in) as training first saw it, in fp32."""
    weight = base.tensors[f"{module}.weight"].read().float()
    if adapter.quantization is not None and module in adapter.quantized_modules:
        return adapter.quantization.round_trip(weight)
    return weight

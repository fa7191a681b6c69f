"""Memory that is used again: for each new piece of it the system would clear every page first."""

from __future__ import annotations

import torch
from torch import Tensor


class ReusedMemory:
    """One piece of host memory, as large as the largest size asked for; taking overwrites what was taken."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """`count` elements of `dtype`, (count,), valid until the next call; their values are arbitrary."""
        size = count * dtype.itemsize
        if len(self._bytes) < size:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # the old piece goes first
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size].view(dtype)

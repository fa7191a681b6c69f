"""How many bytes of tensors a stretch of work holds at once, by the allocator's own record."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile


class AllocatedPeak:
    """Inside the block, counts what the CPU allocator hands out and takes back, temporaries included."""

    def __enter__(self) -> AllocatedPeak:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        found = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        deltas = [event.nbytes() for event in sorted(found, key=lambda event: event.start_ns())]
        self.bytes = max(accumulate(deltas, initial=0))

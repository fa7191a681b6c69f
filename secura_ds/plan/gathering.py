"""Which weights ZeRO-3 holds whole at each point of a pass, and the bytes it moves for that.

DeepSpeed records the order in which modules use their weights. From then on it gathers ahead whenever a
module begins, up to `stage3_prefetch_bucket_size`, keeps what is used again within
`stage3_max_reuse_distance`, and gathers nothing ahead beyond `stage3_max_live_parameters`. This follows
those rules over a simulated pass.

Gathered together, weights arrive in one buffer and are copied out of it when the first of them is used; the
buffer goes when all of them have been used. A weight gathered alone stays where it arrived.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from secura_ds.plan.simulation import Event


class Weight(NamedTuple):
    """A parameter that ZeRO-3 has cut: `numel` elements of `itemsize` bytes in `ranks` equal parts."""

    name: str
    numel: int
    itemsize: int
    ranks: int
    trained: bool
    persistent: bool
    """Kept whole always (`stage3_param_persistence_threshold`)."""

    @property
    def size(self) -> int:
        """Bytes of the whole."""
        return self.numel * self.itemsize

    @property
    def slice(self) -> int:
        """Bytes of one rank's part, padding included."""
        return -(-self.numel // self.ranks) * self.itemsize


class Limits(NamedTuple):
    """DeepSpeed's settings, in elements."""

    prefetch: int
    live: int
    reuse: int


class Gathered(NamedTuple):
    """`peaks[i]` and `levels[i]`: bytes of whole weights while and after event i begins; and bytes moved."""

    peaks: list[int]
    levels: list[int]
    moved: int
    """Bytes of weights gathered in the pass, counted whole."""


def gathered(
    events: Sequence[Event], reads: Mapping[str, Sequence[Weight]], limits: Limits, *, copies: bool = False
) -> Gathered:
    """What is whole at each event.

    Args:
        reads: the weights that each module's fetch asks for.
        copies: the collective receives into a buffer of its own first, as gloo does.
    """
    order = [list(reads.get(e.module, ())) for e in events if e.kind == "fetch"]
    follower = _Follower(order, limits, copies)
    peaks, levels = [], []
    for event in events:
        follower.highest = follower.held
        if event.kind == "fetch":
            follower.fetch(event.module, event.phase, reads.get(event.module, ()))
        elif event.kind == "release":
            follower.release(event.module, event.phase, reads.get(event.module, ()))
        peaks.append(follower.highest)
        levels.append(follower.held)
    return Gathered(peaks, levels, follower.moved)


@dataclass
class _Group:
    """Weights that were gathered in one call; `buffer` bytes are held until all of them have been used."""

    waiting: set[str]
    buffer: int
    copied: bool = False


@dataclass
class _Follower:
    """DeepSpeed's coordinator of partitioned parameters, for one pass with a complete trace."""

    order: list[list[Weight]]
    limits: Limits
    copies: bool = False
    held: int = 0
    highest: int = 0
    moved: int = 0
    step: int = 0
    _whole: dict[str, int] = field(default_factory=dict)
    _inflight: dict[str, _Group] = field(default_factory=dict)
    _using: dict[str, set[str]] = field(default_factory=dict)
    _fetched_for: dict[str, int] = field(default_factory=dict)
    _recomputed: dict[str, list[Weight]] = field(default_factory=dict)
    _live: int = 0

    def __post_init__(self) -> None:
        self._queue = deque((weight, step) for step, weights in enumerate(self.order) for weight in weights)
        numels = [sum(weight.numel for weight in weights) for weights in self.order]
        self._before = [0]
        for numel in numels:
            self._before.append(self._before[-1] + numel)
        self._uses: dict[str, list[int]] = {}
        self._sizes = {weight.name: weight.size for weights in self.order for weight in weights}
        for step, weights in enumerate(self.order):
            for weight in weights:
                self._uses.setdefault(weight.name, []).append(step)

    def fetch(self, module: str, phase: str, weights: Sequence[Weight]) -> None:
        """Gather what a module needs now, then what comes next."""
        if phase == "backward":
            self._recomputed.setdefault(module, [])
        self._gather([w for w in weights if self._missing(w)])
        for weight in weights:
            self._using.setdefault(weight.name, set()).add(module)
            if phase == "recompute" and self._recomputed and not weight.trained:
                # The module whose backward pass called for the recomputation lets go of it.
                next(reversed(self._recomputed.values())).append(weight)
            self._wait(weight)
        fresh = {w.name for w in weights if self._fetched_for.get(w.name, -1) < self.step}
        popped: set[str] = set()
        while self._queue and len(popped) < len(fresh):
            weight, step = self._queue.popleft()
            self._fetched_for[weight.name] = step
            popped.add(weight.name)
        self._prefetch()
        self.step += 1

    def release(self, module: str, phase: str, weights: Sequence[Weight]) -> None:
        """Let go of what is not used again soon."""
        recomputed = self._recomputed.pop(module, []) if phase == "backward" else []
        for weight in (*weights, *recomputed):
            users = self._using.get(weight.name, set())
            users.discard(module)
            skipped = self._fetched_for.get(weight.name, -1) > self.step
            kept = weight not in recomputed and (skipped or self._used_again_soon(weight))
            if not (kept or users or weight.persistent) and weight.name not in self._inflight:
                self._drop(weight)

    def _drop(self, weight: Weight) -> None:
        if weight.name in self._whole:
            self.held -= self._whole.pop(weight.name)
            self._live -= weight.numel

    def _missing(self, weight: Weight) -> bool:
        return not weight.persistent and weight.name not in self._whole and weight.name not in self._inflight

    def _gather(self, weights: Sequence[Weight]) -> None:
        if not weights:
            return
        self._live += sum(weight.numel for weight in weights)
        self.moved += sum(weight.size for weight in weights)
        if weights[0].ranks == 1:
            self._whole.update((weight.name, 0) for weight in weights)
            return
        arriving = [weight.slice * weight.ranks for weight in weights]
        self._hold(sum(arriving))
        if self.copies:
            # The work in flight has a buffer of its own until it is waited for.
            self._hold(sum(arriving))
            self.held -= 0 if len(weights) > 1 else sum(arriving)
        if len(weights) == 1:
            self._whole[weights[0].name] = arriving[0]
            return
        group = _Group({weight.name for weight in weights}, sum(arriving))
        self._inflight.update((weight.name, group) for weight in weights)
        for weight in weights:
            self._whole[weight.name] = 0  # until it is copied out of the buffer

    def _wait(self, weight: Weight) -> None:
        group = self._inflight.get(weight.name)
        if group is None:
            return
        if not group.copied:
            group.copied = True
            sizes = {name: self._sizes[name] for name in group.waiting}
            self.held -= group.buffer if self.copies else 0
            self._hold(sum(sizes.values()))
            self._whole.update(sizes)
        del self._inflight[weight.name]
        group.waiting.discard(weight.name)
        if not group.waiting:
            self.held -= group.buffer

    def _prefetch(self) -> None:
        budget = min(self.limits.live - self._live, self.limits.prefetch)
        chosen: dict[str, Weight] = {}
        numel = 0
        while self._queue and numel < budget:
            weight, step = self._queue.popleft()
            self._fetched_for[weight.name] = max(self._fetched_for.get(weight.name, -1), step)
            if weight.name not in chosen and self._missing(weight):
                chosen[weight.name] = weight
                numel += weight.numel
        self._gather(list(chosen.values()))

    def _used_again_soon(self, weight: Weight) -> bool:
        following = next((step for step in self._uses[weight.name] if step >= self.step), None)
        return following is not None and self._before[following] - self._before[self.step] < self.limits.reuse

    def _hold(self, size: int) -> None:
        self.held += size
        self.highest = max(self.highest, self.held)

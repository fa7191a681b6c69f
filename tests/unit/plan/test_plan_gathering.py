"""What ZeRO-3 holds whole, against DeepSpeed's rules followed by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from secura_ds.plan.gathering import Gathered, Limits, Weight, gathered
from secura_ds.plan.settings import Zero
from secura_ds.plan.simulation import Event

NAMES = ("a", "b", "c")
WIDE = 10**9


def weight(name: str, numel: int = 10, **changes: bool) -> Weight:
    facts = {"trained": False, "persistent": False, **changes}
    return Weight(name, numel, itemsize=2, ranks=2, **facts)


def event(kind: str, module: str, phase: str = "forward") -> Event:
    return Event(kind, module, phase, None, 0, 0)


def there_and_back() -> list[Event]:
    """Modules a, b and c forward, c, b and a backward; each lets go before the next begins."""
    forward = [event(kind, name) for name in NAMES for kind in ("fetch", "release")]
    back = [event(kind, name, "backward") for name in reversed(NAMES) for kind in ("fetch", "release")]
    return forward + back


def follow(
    prefetch: int = 0, live: int = WIDE, reuse: int = 0, *, numel: Sequence[int] = (10, 10, 10), **more: bool
) -> Gathered:
    reads = {name: [weight(name, count)] for name, count in zip(NAMES, numel, strict=True)}
    return gathered(there_and_back(), reads, Limits(prefetch, live, reuse), **more)


def test_without_looking_ahead_one_weight_is_whole_at_a_time() -> None:
    found = follow()
    assert found.levels == [20, 0] * 6
    assert found.moved == 6 * 20


def test_an_odd_weight_arrives_with_its_padding() -> None:
    assert follow(numel=(11, 10, 10)).levels[:4] == [24, 0, 20, 0]


def test_what_is_used_again_soon_stays() -> None:
    """Three weights of 10: c is used again at once, b after 10 elements, a after 20 more."""
    assert follow(reuse=1).levels == [20, 0, 20, 0, 20, 20, 20, 0, 20, 0, 20, 0]
    assert follow(reuse=WIDE).levels == [20, 20, 40, 40, 60, 60, 60, 40, 40, 20, 20, 0]
    assert follow(reuse=WIDE).moved == 60


def test_weights_gathered_together_are_copied_out_of_one_buffer() -> None:
    """a alone; then b and c in one buffer of 40, copied when b is used; the buffer goes with c's use."""
    found = follow(prefetch=11, reuse=WIDE)
    assert found.levels == [20 + 40, 60, 60 + 40, 100, 60, 60, 60, 40, 40, 20, 20, 0]
    assert found.moved == 60


def test_nothing_is_gathered_ahead_beyond_the_limit() -> None:
    """With 10 elements live and 11 allowed, one more weight (of 10) is gathered ahead, alone."""
    assert follow(prefetch=100, live=11, reuse=WIDE).levels[:1] == [40]
    assert follow(prefetch=100, live=10, reuse=WIDE).levels[:1] == [20]


def test_gloo_receives_into_a_buffer_of_its_own() -> None:
    alone = follow(copies=True)
    assert alone.peaks[0] == 40 and alone.levels[0] == 20
    together = follow(prefetch=11, reuse=WIDE, copies=True)
    assert together.levels[0] == 20 + 2 * 40  # in flight until b is used
    assert together.levels[2] == 60 + 40


def test_persistent_weights_are_never_gathered_or_let_go() -> None:
    reads = {"a": [weight("a", persistent=True)], "b": [weight("b")], "c": [weight("c")]}
    found = gathered(there_and_back(), reads, Limits(0, WIDE, 0))
    assert found.levels == [0, 0, 20, 0, 20, 0, 20, 0, 20, 0, 0, 0]


def test_recomputed_weights_go_with_the_module_that_called_for_them() -> None:
    """c's backward pass recomputes a and b; when it ends they go, though they are used again at once."""
    recomputed = [event(kind, name, "recompute") for name in "ab" for kind in ("fetch", "release")]
    events = there_and_back()
    events[7:7] = recomputed
    reads = {name: [weight(name)] for name in NAMES}
    found = gathered(events, reads, Limits(0, WIDE, WIDE))
    end_of_c = 7 + len(recomputed)
    assert found.levels[end_of_c - 1] == 60
    assert found.levels[end_of_c] == 0
    assert found.moved == 60 + 2 * 20
    reads["a"] = [weight("a", trained=True)]  # lets go by its own hook
    assert gathered(events, reads, Limits(0, WIDE, WIDE)).levels[end_of_c] == 20


def test_one_rank_gathers_nothing() -> None:
    reads = {name: [weight(name)._replace(ranks=1)] for name in NAMES}
    assert set(gathered(there_and_back(), reads, Limits(100, WIDE, WIDE)).levels) == {0}


def test_defaults_are_deepspeeds_own() -> None:
    own = DeepSpeedZeroConfig(stage=3)
    read = Zero.read({"zero_optimization": {"stage": 3}}, hidden_size=64)
    assert read == Zero(
        stage=3,
        reduce_bucket=own.reduce_bucket_size,
        allgather_bucket=own.allgather_bucket_size,
        prefetch=own.prefetch_bucket_size,
        sub_group=own.sub_group_size,
        persistence=own.param_persistence_threshold,
        live=own.max_live_parameters,
        reuse=own.max_reuse_distance,
        overlap=bool(own.overlap_comm),
        contiguous_gradients=own.contiguous_gradients,
        saves_inputs=own.memory_efficient_linear,
    )


@pytest.mark.parametrize("hidden", [64, 4096])
def test_auto_is_what_transformers_makes_of_it(hidden: int) -> None:
    names = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    read = Zero.read({"zero_optimization": {"stage": 3, **dict.fromkeys(names, "auto")}}, hidden)
    assert (read.reduce_bucket, read.prefetch, read.persistence) == (
        hidden**2,
        int(0.9 * hidden**2),
        10 * hidden,
    )

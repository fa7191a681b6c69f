"""What the plan takes from a DeepSpeed configuration, and the machine it is made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "allgather_bucket_size": 5e8,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "sub_group_size": 1e9,
}


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's settings that decide about memory; stage 0 is training without DeepSpeed. In elements."""

    stage: int = 0
    reduce_bucket: int = 0
    allgather_bucket: int = 0
    prefetch: int = 0
    persistence: int = 0
    live: int = 0
    reuse: int = 0
    sub_group: int = 0
    overlap: bool = False
    contiguous_gradients: bool = True
    saves_inputs: bool = False
    """Linear layers keep their input for the backward pass, also where the weight is frozen."""
    offload_weights: bool = False
    offload_optimizer: bool = False

    @classmethod
    def read(cls, settings: Mapping[str, Any] | None, hidden_size: int) -> Zero:
        """A DeepSpeed configuration's settings, DeepSpeed's defaults and transformers' "auto" filled in."""
        if settings is None:
            return cls()
        given = settings["zero_optimization"]
        stage = int(given["stage"])
        auto = {
            "reduce_bucket_size": hidden_size**2,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }

        def number(name: str) -> int:
            value = given.get(name, _DEFAULTS[name])
            return int(auto[name] if value == "auto" else value)

        overlap = given.get("overlap_comm")
        return cls(
            stage=stage,
            reduce_bucket=number("reduce_bucket_size"),
            allgather_bucket=number("allgather_bucket_size"),
            prefetch=number("stage3_prefetch_bucket_size"),
            persistence=number("stage3_param_persistence_threshold"),
            live=number("stage3_max_live_parameters"),
            reuse=number("stage3_max_reuse_distance"),
            sub_group=number("sub_group_size"),
            overlap=stage == 3 if overlap is None else bool(overlap),
            contiguous_gradients=bool(given.get("contiguous_gradients", True)),
            saves_inputs=stage == 3 and bool(given.get("memory_efficient_linear", True)),
            offload_weights=stage == 3 and _offloaded(given.get("offload_param")),
            offload_optimizer=_offloaded(given.get("offload_optimizer")),
        )


def _offloaded(section: Mapping[str, Any] | None) -> bool:
    return section is not None and section.get("device", "none") != "none"


@dataclass(frozen=True)
class Devices:
    """The machine: `per_node` devices on each of `nodes` nodes, one process a device."""

    kind: str = "cpu"
    """"cpu" or "cuda"."""
    per_node: int = 1
    nodes: int = 1
    memory: int | None = None
    """Bytes that a process may use on its device; None: not known."""
    host_memory: int | None = None
    """Bytes that the processes of a node may use of its main memory; None: not known."""

    @property
    def ranks(self) -> int:
        """Processes of the run."""
        return self.per_node * self.nodes

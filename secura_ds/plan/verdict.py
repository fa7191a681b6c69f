"""Whether a plan fits a machine, and which three changes of the recipe would free most where it does not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from secura_ds.errors import UserError
from secura_ds.plan.planning import Plan, plan
from secura_ds.plan.settings import Devices
from secura_ds.plan.simulation import Work
from secura_ds.recipe import CabrSettings, Recipe, changed

CUDA_RESERVE = 2**30  # CUDA context, NCCL's buffers and the allocator's fragmentation
ADVICE = 3
ZERO3, OFFLOAD = "deepspeed/zero3.json", "deepspeed/zero3-offload.json"


@dataclass(frozen=True)
class Verdict:
    """A plan against a machine, in bytes; a limit that is not known is None and always kept to."""

    needed: int
    """What the fullest device must provide, without `reserve`."""
    reserve: int
    limit: int | None
    host_needed: int
    host_limit: int | None
    phase: str
    """When most is needed."""
    largest_part: str
    """The part of the step that takes most."""

    @property
    def excess(self) -> int:
        """Bytes that are lacking on the fullest device; negative: bytes that are left."""
        return 0 if self.limit is None else self.needed + self.reserve - self.limit

    @property
    def host_excess(self) -> int:
        """Bytes of main memory that are lacking on a node; negative: bytes that are left."""
        return 0 if self.host_limit is None else self.host_needed - self.host_limit

    @property
    def fits(self) -> bool:
        """True if nothing is lacking."""
        return self.excess <= 0 and self.host_excess <= 0


def judge(planned: Plan, devices: Devices, *, reserve: int | None = None) -> Verdict:
    """Compare a plan with a machine.

    Args:
        reserve: bytes of each device that are not the plan's; by default 1 GiB of a GPU, none of a CPU.
    """
    on_cpu = planned.device == "cpu"
    per_node = planned.ranks // planned.nodes
    phases, needed = planned.needed, planned.needed_bytes
    # A CPU never provides the buckets' empty part.
    parts = {name: size for name, size in planned.parts.items() if not (on_cpu and "buckets" in name)}
    host = planned.host_bytes + (needed * per_node if on_cpu else 0)
    return Verdict(
        needed=needed,
        reserve=(0 if on_cpu else CUDA_RESERVE) if reserve is None else reserve,
        limit=devices.memory,
        host_needed=host,
        host_limit=devices.host_memory,
        phase=max(phases, key=lambda name: phases[name]),
        largest_part=max(parts, key=lambda name: parts[name]),
    )


class Change(NamedTuple):
    """A change of the recipe or the launch, and what it does."""

    text: str
    """What to add to the command, such as `--set training.gradient_checkpointing=true`."""
    frees: int
    """Bytes less that the fullest device (or, where main memory lacks, the node) must provide."""
    fits: bool


class _Candidate(NamedTuple):
    text: str
    overrides: tuple[str, ...]
    ranks: int


def advice(
    recipe: Recipe,
    config: PreTrainedConfig,
    planned: Plan,
    devices: Devices,
    *,
    settings: Mapping[str, Any] | None = None,
    work: Work | None = None,
    reserve: int | None = None,
) -> list[Change]:
    """The changes that free most, each planned anew, most first.

    Args:
        planned: the plan that does not fit.
        settings, work: as `plan` was given them.
    """
    before = judge(planned, devices, reserve=reserve)
    found = []
    for candidate in _candidates(recipe, planned):
        try:
            other = changed(recipe, candidate.overrides)
            after = judge(
                _replan(other, config, planned, candidate, settings, work), devices, reserve=reserve
            )
        except UserError:
            continue  # this recipe or machine does not allow it
        frees = before.needed - after.needed
        if before.host_excess > max(0, before.excess):
            frees = before.host_needed - after.host_needed
        if frees > 0:
            found.append(Change(candidate.text, frees, after.fits))
    return sorted(found, key=lambda change: -change.frees)[:ADVICE]


def _replan(
    recipe: Recipe,
    config: PreTrainedConfig,
    planned: Plan,
    candidate: _Candidate,
    settings: Mapping[str, Any] | None,
    work: Work | None,
) -> Plan:
    if any(text.startswith("training.deepspeed=") for text in candidate.overrides):
        settings = None
    if work is not None:
        # What the data showed, cut as the change cuts it.
        batch = min(work.batch, recipe.training.micro_batch_size)
        length = min(work.length, recipe.data.max_length)
        learnt = max(1, work.learnt * batch * length // (work.batch * work.length))
        work = work._replace(batch=batch, length=length, learnt=learnt, padded=work.padded and batch > 1)
    nodes = planned.nodes * candidate.ranks // planned.ranks
    return plan(
        recipe,
        config,
        ranks=candidate.ranks,
        device=planned.device,
        nodes=max(1, nodes),
        settings=settings,
        work=work,
    )


def _candidates(recipe: Recipe, planned: Plan) -> Iterator[_Candidate]:
    """Changes that leave what is learnt nearly as it is; uncalibrated factors only where nothing else can."""
    training, backbone, ranks = recipe.training, recipe.backbone, planned.ranks
    on_gpu = planned.device == "cuda"

    def override(*texts: str) -> _Candidate:
        return _Candidate(" ".join(f"--set {text}" for text in texts), texts, ranks)

    if max(planned.phases, key=lambda name: planned.phases[name]) == "calibration":
        yield override("adapter.selection=least")
    if not training.gradient_checkpointing:
        yield override("training.gradient_checkpointing=true")
    if on_gpu and not training.activation_offloading:
        yield override("training.activation_offloading=true")
    if backbone.attention == "eager":
        yield override("backbone.attention=auto")
    m1 = isinstance(recipe.adapter, CabrSettings) and recipe.adapter.strategy == "M1"
    if backbone.quantization is None and backbone.dtype != "float32" and not m1:
        yield override("backbone.quantization.kind=nf4")
    if training.micro_batch_size > 1:
        half = training.micro_batch_size // 2
        passes = training.gradient_accumulation_steps * training.micro_batch_size // half
        yield override(f"training.micro_batch_size={half}", f"training.gradient_accumulation_steps={passes}")
    if recipe.data.max_length > 256:
        yield override(f"data.max_length={recipe.data.max_length // 2}")
    if planned.zero_stage == 0 and training.optimizer != "paged_adamw_8bit" and on_gpu:
        yield override("training.optimizer=paged_adamw_8bit")
    if ranks > 1 and planned.zero_stage < 3:
        yield override(f"training.deepspeed={json.dumps(ZERO3)}")
    if ranks > 1 and on_gpu:
        yield override(f"training.deepspeed={json.dumps(OFFLOAD)}")
    if planned.zero_stage == 3 and on_gpu:
        yield _Candidate(f"twice the GPUs ({2 * ranks})", (), 2 * ranks)

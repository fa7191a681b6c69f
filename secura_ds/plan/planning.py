"""From a recipe and a model's configuration to a `Plan`: what a run will hold, move and write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from secura_ds.backbones.adapter import backbone_of, refuse_stage
from secura_ds.errors import UserError
from secura_ds.plan import disk, kernels, phases, traffic
from secura_ds.plan.blueprint import draw
from secura_ds.plan.gathering import Gathered, Limits, gathered
from secura_ds.plan.parts import at_rest, bucket_bytes, weight
from secura_ds.plan.settings import Zero
from secura_ds.plan.simulation import Event, Work, reads, simulate
from secura_ds.reading import read_json_object
from secura_ds.recipe import Recipe

STEP_PARTS = ("gathered_weights", "activations", "logits_and_loss", "backward_buckets", "library_workspaces")


@dataclass(frozen=True)
class Plan:
    """What one run will take. Every number is in bytes; per-rank numbers are the largest rank's."""

    recipe: str
    model: str
    device: str
    ranks: int
    nodes: int
    zero_stage: int
    """0 without DeepSpeed."""
    attention: str
    batch: int
    length: int
    learnt: int
    """Tokens of a forward pass that count for the loss."""
    trained_parameters: int
    all_parameters: int
    parts: dict[str, int] = field(default_factory=dict)
    """What a rank's device holds when a training step needs most, by part."""
    phases: dict[str, int] = field(default_factory=dict)
    """The most that a rank's device holds while loading, calibrating, training and stepping."""
    untouched: int = 0
    """Bytes of `parts` that are allocated but never written, so that a CPU never provides them."""
    host: dict[str, int] = field(default_factory=dict)
    """Main memory of one node, by use, all its ranks together; besides what CPU ranks hold as devices."""
    disk: dict[str, int] = field(default_factory=dict)
    """Size of a checkpoint, of what checkpoints share, of the adapter and of a merged model."""
    traffic: dict[str, int] = field(default_factory=dict)
    """Bytes that a rank receives in one optimizer step, by purpose."""

    @property
    def per_rank_bytes(self) -> int:
        """The most that a rank's device holds at any time of the run."""
        return max(self.phases.values())

    @property
    def needed(self) -> dict[str, int]:
        """`phases`, on a CPU without what is allocated but never written."""
        spared = self.untouched if self.device == "cpu" else 0
        with_buffers = ("training", "optimizer_step")
        return {name: size - spared * (name in with_buffers) for name, size in self.phases.items()}

    @property
    def needed_bytes(self) -> int:
        """What the device must provide."""
        return max(self.needed.values())

    @property
    def step_bytes(self) -> int:
        """The most that a rank's device holds in a training step; what an allocator's peak shows."""
        return self.phases["training"]

    @property
    def host_bytes(self) -> int:
        """Main memory of one node."""
        return sum(self.host.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it back."""
        return {**asdict(self), "per_rank_bytes": self.per_rank_bytes, "host_bytes": self.host_bytes}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` wrote."""
        derived = ("per_rank_bytes", "host_bytes")
        return cls(**{key: value for key, value in values.items() if key not in derived})


class _Peak(NamedTuple):
    """The moment of a step that needs most, above what is held between steps."""

    total: int
    gathered: int
    activations: int
    loss: int
    buckets: int


def plan(
    recipe: Recipe,
    config: PreTrainedConfig,
    *,
    ranks: int = 1,
    device: str = "cuda",
    nodes: int = 1,
    settings: Mapping[str, Any] | None = None,
    work: Work | None = None,
) -> Plan:
    """What training as `recipe` says will take, from the model's configuration alone.

    Args:
        config: the backbone's configuration (`backbones.load_config`).
        ranks: processes of the run, one a device.
        device: "cuda" or "cpu".
        nodes: machines that the ranks are spread over evenly.
        settings: the DeepSpeed configuration in use; by default the recipe's if there are several ranks.
        work: the largest forward pass; by default full rows of `data.max_length` in which all is learnt.

    Raises:
        UserError: the recipe does not fit the backbone or the number of ranks.
    """
    if settings is None and ranks > 1:
        settings = deepspeed_file(recipe)
    zero = Zero.read(settings, config.get_text_config().hidden_size)
    refuse_stage(recipe, zero.stage)
    model = draw(recipe, config, sharded=zero.stage > 0)
    training = recipe.training
    work = work or fullest(recipe)
    accumulates = training.gradient_accumulation_steps > 1
    passed = simulate(
        model,
        work,
        device=device,
        checkpointing=training.gradient_checkpointing,
        offloading=training.activation_offloading and device == "cuda",
        saves_inputs=zero.saves_inputs,
        keeps_gradients=zero.stage == 0 and not accumulates,
    )
    rest = at_rest(model, zero, ranks, optimizer=training.optimizer, device=device, accumulates=accumulates)
    whole = gathers(model, passed.events, zero, ranks, device) if zero.stage == 3 else None
    itemsize = getattr(torch, recipe.backbone.dtype).itemsize
    buckets = bucket_bytes(zero, itemsize) if zero.stage in (1, 2) else 0
    peak = _peak(passed.events, whole, buckets)
    workspaces = kernels.LIBRARY_WORKSPACES if device == "cuda" else 0
    step = (peak.gathered, peak.activations, peak.loss, peak.buckets, workspaces)
    parts = {**rest.device, **dict(zip(STEP_PARTS, step, strict=True))}
    subject = phases.Subject(recipe, config, model, rest, zero, ranks, device)
    return Plan(
        recipe=recipe.name,
        model=recipe.backbone.model,
        device=device,
        ranks=ranks,
        nodes=nodes,
        zero_stage=zero.stage,
        attention=backbone_of(model).config._attn_implementation,
        batch=work.batch,
        length=work.length,
        learnt=work.learnt,
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        all_parameters=disk.elements(model),
        parts=parts,
        phases={
            "loading": phases.loading(subject),
            "calibration": phases.calibrating(subject),
            "training": sum(parts.values()),
            "optimizer_step": phases.stepping(subject),
        },
        untouched=rest.untouched + max(0, peak.buckets - disk.trained_bytes(model)),
        host=phases.host(subject, ranks // nodes, passed.offloaded),
        disk=disk.sizes(recipe, model),
        traffic=traffic.per_step(recipe, model, zero, ranks, whole.moved if whole else 0),
    )


def deepspeed_file(recipe: Recipe) -> dict[str, Any]:
    """The DeepSpeed configuration that the recipe names.

    Raises:
        UserError: it names none, or the file cannot be read or names no stage.
    """
    name = recipe.training.deepspeed
    if name is None:
        raise UserError(
            "training.deepspeed is null, which trains on one device: plan for --gpus 1, or name a "
            'configuration such as "deepspeed/zero3.json"'
        )
    path = recipe.resolve_path(name)
    settings = read_json_object(path, remedy="name a DeepSpeed configuration")
    zero = settings.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}: 1, 2 or 3")
    return settings


def fullest(recipe: Recipe) -> Work:
    """The largest forward pass that the recipe allows: full rows, every token learnt."""
    batch, length = recipe.training.micro_batch_size, recipe.data.max_length
    if recipe.data.packing:
        return Work(1, batch * length, batch * length - 1, padded=False, packed=True)
    return Work(batch, length, batch * (length - 1), padded=batch > 1)


def gathers(model: nn.Module, events: Sequence[Event], zero: Zero, ranks: int, device: str) -> Gathered:
    """What ZeRO-3 holds whole at each event of a pass."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_module = {
        name: [weight(names[id(p)], p, zero, ranks) for p in reads(module).values()]
        for name, module in model.named_modules()
        if reads(module)
    }
    return gathered(events, by_module, Limits(zero.prefetch, zero.live, zero.reuse), copies=device == "cpu")


def _peak(events: Sequence[Event], whole: Gathered | None, buckets: int) -> _Peak:
    """The highest sum of activations, gathered weights and, in the backward pass, reduce buckets."""
    level = before_loss = 0
    best = _Peak(-1, 0, 0, 0, 0)
    returning = False
    for i, event in enumerate(events):
        in_layers = event.layer is not None
        returning = returning or event.phase == "backward"
        if in_layers and event.phase == "forward":
            before_loss = level + event.change
        fetched, kept = (whole.peaks[i], whole.levels[i]) if whole is not None else (0, 0)
        for held, weights in ((level, fetched), (level + event.peak, kept)):
            filled = buckets if returning else 0
            if held + weights + filled > best.total:
                loss = 0 if in_layers else max(0, held - before_loss)
                best = _Peak(held + weights + filled, weights, held - loss, loss, filled)
        level += event.change
    return best

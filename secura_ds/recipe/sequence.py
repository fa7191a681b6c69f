"""A recipe of task sequences: which tasks, in which orders, under which methods and strategies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from secura_ds.recipe.adapter import AnyMethod, CabrSettings
from secura_ds.recipe.base import RULE, Document, PositiveFloat, PositiveInt, Section, Seed
from secura_ds.recipe.rules import refuse_4_bit, refuse_rounded_masters
from secura_ds.recipe.schema import (
    BackboneRecipe,
    OutputFolder,
    Probe,
    StageTraining,
)


def _named(values: list[str]) -> list[str]:
    if path := next((value for value in values if "/" in value or value.endswith(".yaml")), None):
        raise ValueError(f"{path!r} is a path: give the task's name, and its folder in task_folders")
    return values


def _distinct(values: list[Any]) -> list[Any]:
    if double := next((value for i, value in enumerate(values) if value in values[:i]), None):
        raise ValueError(f"{double!r} is given twice")
    return values


class Sequential(Section):
    """One task after another, nothing else: the same adapter goes on learning."""

    kind: Literal["seq"] = "seq"
    """The strategy."""


class ExperienceReplay(Section):
    """Every step also learns from examples of earlier tasks (arXiv 1902.10486)."""

    kind: Literal["er"]
    """The strategy."""
    buffer_size: PositiveInt = 200
    """Examples that are kept of all earlier tasks together, as many of each."""
    per_step: PositiveInt = 4
    """Kept examples added to each optimizer step, over all ranks."""


class ElasticWeights(Section):
    """Elastic weight consolidation (arXiv 1612.00796): a spring holds what mattered for earlier tasks."""

    kind: Literal["ewc"]
    """The strategy."""
    penalty: PositiveFloat = 100.0
    """Strength lambda of `lambda / 2 * F * (theta - theta_before)^2`."""
    online: bool = False
    """One Fisher information and one anchor for all earlier tasks (arXiv 1805.06370), not one a task."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    """What remains of the earlier Fisher information per task, in the online variant."""
    fisher_examples: PositiveInt = 200
    """Examples of each task that its Fisher information is estimated on."""

    @field_validator("decay")
    @classmethod
    def _only_online(cls, value: float, info: ValidationInfo) -> float:
        if value != 0.9 and info.data.get("online") is False:
            raise ValueError("only the online variant has a decay: set online true, or leave it out")
        return value


class InterpolatedLora(Section):
    """I-LoRA (arXiv 2402.18865): a slow copy of the adapter, which replayed examples must agree with."""

    kind: Literal["i-lora"]
    """The strategy."""
    buffer_size: PositiveInt = 200
    """Examples that are kept of all earlier tasks together, as many of each."""
    per_step: PositiveInt = 4
    """Kept examples added to each optimizer step, over all ranks."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Share of the long-term memory that a step leaves."""
    consistency: PositiveFloat = 1.0
    """Weight of the squared distance between both memories' last hidden states of replayed examples."""


class Protection(Section):
    """C and R are chosen clear of what earlier tasks need, as they are of general text."""

    kind: Literal["protect"]
    """The strategy."""
    buffer_size: PositiveInt = 200
    """Examples that are kept of all earlier tasks together, as many of each."""


AnyStrategy = Annotated[
    Sequential | ExperienceReplay | ElasticWeights | InterpolatedLora | Protection,
    Field(discriminator="kind"),
]


class Entry(Section):
    """One method under one strategy; several learning rates are as many sequences."""

    name: Annotated[str, Field(pattern=r"^[\w][\w.-]*$")]
    """Short name, used in folders and reports."""
    adapter: AnyMethod
    strategy: AnyStrategy = Sequential()
    """How earlier tasks are kept in mind."""
    learning_rates: Annotated[list[PositiveFloat], Field(min_length=1), AfterValidator(_distinct)]
    """Peak learning rates, each a sequence of its own."""

    @field_validator("strategy")
    @classmethod
    def _combines(cls, value: AnyStrategy, info: ValidationInfo) -> AnyStrategy:
        adapter = info.data.get("adapter")
        if isinstance(value, Protection) and not (isinstance(adapter, CabrSettings) and adapter.renews):
            raise ValueError(
                '"protect" acts where each task has factors of its own: use it with selection "calibrated", '
                'calibration.mode "contrast" and strategy "M1", or another strategy'
            )
        if value.kind in ("ewc", "i-lora") and isinstance(adapter, CabrSettings):
            reason = (
                'strategy "M1"' if adapter.strategy == "M1" else "fold_every" if adapter.fold_every else None
            )
            if reason is not None:
                raise ValueError(
                    f'"{value.kind}" compares parameters over time, and the adapter\'s {reason} moves what '
                    'they stand for elsewhere: use strategy "M2" with fold_every 0, or "er"'
                )
        return value


class SequenceData(Section):
    """What is learnt of each task."""

    max_examples: PositiveInt | None = None
    """Training examples used of each task, from the front."""
    max_length: Annotated[int, Field(ge=2, lt=2**31)] = 1024
    """Longest example in tokens; longer ones are cut."""
    packing: bool = False
    """Put several short examples into one row."""


class SequenceEvaluation(Section):
    """What is measured before the first task and after each."""

    scores: bool = True
    """Have the model answer, and score it; false measures the loss of the right answers only."""
    max_items: PositiveInt | None = None
    """Held-out items used of each task, from the front."""
    probes: list[Probe] = []
    """The retention probes, of different file names."""
    batch_size: PositiveInt = 8
    """Sequences per forward pass."""

    @field_validator("probes")
    @classmethod
    def _told_apart(cls, value: list[Probe]) -> list[Probe]:
        _distinct([Path(probe.path).stem for probe in value])
        return value


class SequenceRecipe(Document):
    """Task sequences of secura_ds: backbone, tasks, methods, training and evaluation."""

    schema_: Annotated[str | None, Field(alias="$schema")] = None
    """Path of this schema, for editors."""
    name: Annotated[str, Field(pattern=r"^[\w][\w.-]*$")]
    """Short name, used in reports."""
    description: str = ""
    """What it is for and what it needs."""
    output_dir: OutputFolder
    """Folder of the results, relative to the current folder."""
    backbone: BackboneRecipe
    tasks: Annotated[list[str], Field(min_length=1), AfterValidator(_named), AfterValidator(_distinct)]
    """Names of tasks (`recipes/tasks/README.md`)."""
    task_folders: list[str] = []
    """Folders with YAML files of more tasks, relative to the recipe's folder."""
    orders: list[list[str]] | None = None
    """Orders in which the tasks are learnt, each a sequence of its own; null: the one of `tasks`."""
    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)] = [0]
    """Seeds of the adapter and of the order of examples, each a sequence of its own."""
    entries: Annotated[list[Entry], Field(min_length=1)]
    """The methods and strategies that are compared."""
    data: SequenceData = SequenceData()
    training: StageTraining
    evaluation: SequenceEvaluation = SequenceEvaluation()

    @field_validator("orders")
    @classmethod
    def _orders_of_the_tasks(
        cls, value: list[list[str]] | None, info: ValidationInfo
    ) -> list[list[str]] | None:
        tasks = info.data.get("tasks")
        _distinct(value or [])
        for order in value or ():
            _distinct(order)
            if not order:
                raise ValueError("an order has no task")
            if tasks is not None and (unknown := [name for name in order if name not in tasks]):
                raise ValueError(f"{unknown[0]!r} is not among tasks: add it there")
        if value is not None and not value:
            raise ValueError("should hold an order, or be null")
        return value

    @field_validator("entries")
    @classmethod
    def _entries_fit(cls, value: list[Entry], info: ValidationInfo) -> list[Entry]:
        _distinct([entry.name for entry in value])
        most = max(
            (len(order) for order in info.data.get("orders") or [info.data.get("tasks", [])]), default=0
        )
        for entry in value:
            size = getattr(entry.strategy, "buffer_size", most)
            if size < most - 1:
                raise ValueError(
                    f"entry {entry.name}: strategy.buffer_size is {size}, too few to keep an example of each "
                    f"of the {most - 1} tasks before the last: set it higher"
                )
            refuse_4_bit(entry.adapter, info.data.get("backbone"), f"entry {entry.name}: adapter")
        return value

    @field_validator("training")
    @classmethod
    def _exact_weights(cls, value: StageTraining, info: ValidationInfo) -> StageTraining:
        for entry in info.data.get("entries") or ():
            where = f"entry {entry.name}: adapter"
            refuse_rounded_masters(entry.adapter, info.data.get("backbone"), value, where)
        return value

    @field_validator("data")
    @classmethod
    def _packed_rows_mix(cls, value: SequenceData, info: ValidationInfo) -> SequenceData:
        entries = info.data.get("entries") or ()
        replay = next((e.strategy.kind for e in entries if e.strategy.kind in ("er", "i-lora")), None)
        if value.packing and replay is not None:
            raise PydanticCustomError(
                RULE,
                "data.packing puts several examples into one row, in which strategy {kind} could not tell "
                "those that are replayed: set it false",
                {"kind": f'"{replay}"'},
            )
        return value

    def sequences(self) -> Iterator[Sequence]:
        """Every sequence: entries, and within each its learning rates, orders and seeds."""
        orders = self.orders or [self.tasks]
        for entry in self.entries:
            for rate in entry.learning_rates:
                for number, order in enumerate(orders, start=1):
                    for seed in self.seeds:
                        label = f"{entry.name}-lr{rate:g}-order{number}-seed{seed}"
                        yield Sequence(label=label, entry=entry, learning_rate=rate, order=order, seed=seed)


class Sequence(Section):
    """Tasks in one order under one entry, with one learning rate and one seed."""

    label: str
    """Name of its folder: stays the same when the recipe gains entries, rates, orders or seeds at the end."""
    entry: Entry
    learning_rate: float
    order: list[str]
    seed: int


__all__ = [
    "ElasticWeights",
    "Entry",
    "ExperienceReplay",
    "InterpolatedLora",
    "Protection",
    "Sequence",
    "SequenceData",
    "SequenceEvaluation",
    "SequenceRecipe",
    "Sequential",
]

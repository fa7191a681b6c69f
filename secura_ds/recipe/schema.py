"""What a recipe may say: every key, its type, its default and the rules between keys.

The docstring under a field is its description in `recipes/recipe.schema.json`. Rules between keys are
field validators that look at the fields before them, so that one load reports every broken rule.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from secura_ds.embedded import EMBEDDED
from secura_ds.recipe.adapter import (
    Adapter,
    AnyMethod,
    FullTraining,
)
from secura_ds.recipe.base import (
    RULE,
    Document,
    File,
    Fraction,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    find_path,
)
from secura_ds.recipe.rules import refuse_4_bit, refuse_rounded_masters

_HUB_ID = r"[\w-][\w.-]*(/[\w.-]+)?"


def _known_model(value: str, info: ValidationInfo) -> str:
    if value.startswith("embedded:"):
        if value.removeprefix("embedded:") not in EMBEDDED:
            raise ValueError(f"should be one of {', '.join('embedded:' + name for name in EMBEDDED)}")
        return value
    found = find_path(value, (info.context or {}).get("folder", Path.cwd()))
    if found is not None and found.is_dir():
        if not (found / "config.json").is_file():
            raise ValueError(f"{found} holds no config.json, so it is no Hugging Face checkpoint")
        return str(found)
    if not re.fullmatch(_HUB_ID, value):
        raise ValueError(
            "should be embedded:<name>, a hub id such as Qwen/Qwen2-7B-Instruct, or an existing folder"
        )
    return value


def _known_revision(value: str) -> str:
    # The hub's client joins it into the name of a file; git allows none of these either.
    if not re.fullmatch(r"(?![/-])(?!.*\.\.)[^\s~^:?*\[\\\x00-\x1f]+", value):
        raise ValueError("should be a branch, a tag or a commit")
    return value


def _known_data_set(value: str) -> str:
    if not re.fullmatch(_HUB_ID, value):
        raise ValueError("should be a hub id such as HuggingFaceH4/no_robots; a file is given as path")
    return value


def _output_folder(value: str) -> str:
    if "://" in value or not value.isprintable():
        raise ValueError("should be a folder on this machine, without control characters")
    if any(len(os.fsencode(part)) > 255 for part in value.split("/")) or len(os.fsencode(value)) > 2000:
        raise ValueError("should be shorter: a name may have 255 bytes, a path 2000")
    return os.path.expanduser(value)


class Quantization(Section):
    """4-bit weights; storage and compute type follow `backbone.dtype`."""

    kind: Literal["nf4"] = "nf4"
    """NF4 of bitsandbytes."""
    double_quantization: bool = True
    """Also quantize the block scales, which saves 0.4 bit per weight."""


class BackboneRecipe(Section):
    """The pretrained model that stays frozen."""

    model: Annotated[str, AfterValidator(_known_model)]
    """`embedded:smollm2-135m`, a hub id, or a folder with a Hugging Face checkpoint."""
    revision: Annotated[str, AfterValidator(_known_revision)] | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the frozen weights and of the computation."""
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    """Attention kernel; `auto`: flash attention where installed and allowed by the family, else SDPA."""
    quantization: Quantization | None = None
    """4-bit weights, or null for whole ones."""

    @field_validator("quantization")
    @classmethod
    def _half_precision(cls, value: Quantization | None, info: ValidationInfo) -> Quantization | None:
        if value is not None and info.data.get("dtype") == "float32":
            raise ValueError('4-bit weights compute in half precision: set backbone.dtype to "bfloat16"')
        return value


class Source(Section):
    """One data set: a local file or a data set on the hub."""

    path: File | None = None
    """A .jsonl, .json or .parquet file."""
    hub: Annotated[str, AfterValidator(_known_data_set)] | None = None
    """Name of a data set on the hub."""
    subset: str | None = None
    """Configuration of the hub data set."""
    split: str | None = None
    """Split of the hub data set; null means `train`."""
    weight: Annotated[float, Field(gt=0, lt=1e9)] | None = None
    """Share of this source in an epoch, relative to the others; null for all: every example once."""
    format: Literal["auto", "messages", "prompt_completion", "instruction", "text"] = "auto"
    """How a row reads; `auto` tells by its keys."""
    max_examples: PositiveInt | None = None
    """Take only so many rows from the front."""

    @field_validator("hub")
    @classmethod
    def _one_place(cls, value: str | None, info: ValidationInfo) -> str | None:
        if "path" in info.data and (value is None) == (info.data["path"] is None):
            raise ValueError("exactly one of path and hub should be given")
        return value

    @field_validator("subset", "split")
    @classmethod
    def _only_on_hub(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("path") is not None:
            raise ValueError("only a hub data set has this, a file has none: leave it out")
        return value


class DataRecipe(Section):
    """What is learnt from."""

    sources: Annotated[list[Source], Field(min_length=1)]
    """Data sets to mix."""
    validation: Source | None = None
    """Data set for the loss during training."""
    validation_fraction: Fraction = 0.0
    """Or: share of the sources held out for it."""
    max_length: Annotated[int, Field(ge=2, lt=2**31)] = 1024
    """Longest example in tokens; longer ones are cut."""
    packing: bool = False
    """Put several short examples into one row."""
    completion_only: bool = True
    """Learn the answers only, not the prompts."""
    seed: Seed = 0
    """Seed of mixing and splitting."""

    @field_validator("sources")
    @classmethod
    def _all_or_no_weights(cls, value: list[Source]) -> list[Source]:
        without = [number for number, source in enumerate(value) if source.weight is None]
        if 0 < len(without) < len(value):
            raise ValueError(
                f"sources.{without[0]} has no weight, others have: give all of them one, or none"
            )
        return value

    @field_validator("validation_fraction")
    @classmethod
    def _one_validation(cls, value: float, info: ValidationInfo) -> float:
        if value > 0 and info.data.get("validation") is not None:
            raise ValueError("data.validation is given too: keep one of the two")
        return value


OutputFolder = Annotated[str, Field(min_length=1), AfterValidator(_output_folder)]


class StageTraining(Section):
    """How it is learnt, but for what the stages of a task sequence differ in."""

    deepspeed: File | None = None
    """DeepSpeed configuration; null trains on one device without it."""
    epochs: PositiveFloat | None = None
    """Passes over the data; exactly one of `epochs` and `max_steps` is set."""
    max_steps: PositiveInt | None = None
    """Or: optimizer steps."""
    micro_batch_size: PositiveInt = 1
    """Examples per rank and forward pass."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes per optimizer step."""
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Course of the learning rate."""
    warmup_ratio: Fraction = 0.0
    """Share of the steps in which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of the trained parameters."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    optimizer: Literal[
        "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor"
    ] = "adamw_torch"
    """Optimizer, by its name in transformers."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
    activation_offloading: bool = False
    """Keep activations in host memory between the forward and the backward pass: less GPU memory, slower."""
    memory_check: Literal["refuse", "warn", "off"] = "refuse"
    """What happens before anything is loaded if the plan says that the run does not fit."""
    logging_steps: PositiveInt = 10
    """Steps between lines of the log."""
    save_steps: PositiveInt | None = None
    """Steps between checkpoints; null saves at the end only."""
    save_total_limit: PositiveInt = 2
    """Checkpoints kept, the newest ones."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]
    """Where curves are sent."""

    @field_validator("max_steps")
    @classmethod
    def _one_length(cls, value: int | None, info: ValidationInfo) -> int | None:
        if "epochs" in info.data and (value is None) == (info.data["epochs"] is None):
            raise ValueError("exactly one of epochs and max_steps should be given")
        return value

    @field_validator("warmup_ratio")
    @classmethod
    def _warmup_has_effect(cls, value: float, info: ValidationInfo) -> float:
        if value > 0 and info.data.get("scheduler") == "constant":
            raise ValueError('scheduler "constant" has no warmup: use "constant_with_warmup" or 0')
        return value


class TrainingRecipe(StageTraining):
    """How it is learnt."""

    output_dir: OutputFolder
    """Folder of the run, relative to the current folder."""
    learning_rate: PositiveFloat
    """Peak learning rate."""
    save_merged: bool = False
    """Also write the merged checkpoint, `merged/` in the output folder, when training ends."""
    seed: Seed = 0
    """Seed of the adapter and of the order of examples."""
    eval_steps: PositiveInt | None = None
    """Steps between validations; null validates at the end only."""


class Task(Section):
    """Held-out items of the skill that is learnt; answers are generated and scored."""

    path: File
    """JSONL with prompt and completion."""
    metric: Literal["exact_match", "json_exact_match", "bleu", "rougeL"] = "exact_match"
    """How an answer is scored."""
    max_new_tokens: PositiveInt = 128
    """Longest answer in tokens."""
    max_items: PositiveInt | None = None
    """Score only so many items from the front."""


class Probe(Section):
    """A measure of what the model knew before."""

    kind: Literal["multiple_choice", "text_loss"]
    """Choice by likelihood, or mean loss per token."""
    path: File
    """JSONL of questions and choices, or plain text."""
    max_items: PositiveInt | None = None
    """Use only so many items from the front."""


class EvaluationRecipe(Section):
    """What is measured before and after training."""

    task: Task | None = None
    """The skill."""
    probes: list[Probe] = []
    """The retention probes."""
    batch_size: PositiveInt = 8
    """Sequences per forward pass."""


class Recipe(Document):
    """A training run of secura_ds: backbone, adapter, data, training and evaluation."""

    schema_: Annotated[str | None, Field(alias="$schema")] = None
    """Path of this schema, for editors."""
    name: Annotated[str, Field(pattern=r"^[\w][\w.-]*$")]
    """Short name, used in reports."""
    description: str = ""
    """What it is for and what it needs."""
    backbone: BackboneRecipe
    adapter: AnyMethod
    data: DataRecipe
    training: TrainingRecipe
    evaluation: EvaluationRecipe = EvaluationRecipe()

    @field_validator("adapter")
    @classmethod
    def _needs_whole_weights(cls, value: Adapter, info: ValidationInfo) -> Adapter:
        refuse_4_bit(value, info.data.get("backbone"), "adapter")
        return value

    @field_validator("training")
    @classmethod
    def _full_training_is_possible(cls, value: TrainingRecipe, info: ValidationInfo) -> TrainingRecipe:
        if value.save_merged and isinstance(info.data.get("adapter"), FullTraining):
            raise PydanticCustomError(
                RULE,
                'training.save_merged is true, but adapter.method "full" has nothing to merge: its result is '
                "a whole checkpoint; leave it out",
            )
        refuse_rounded_masters(info.data.get("adapter"), info.data.get("backbone"), value, "adapter")
        return value

    @field_validator("training")
    @classmethod
    def _something_to_validate(cls, value: TrainingRecipe, info: ValidationInfo) -> TrainingRecipe:
        data = info.data.get("data")
        if (
            value.eval_steps
            and data is not None
            and data.validation is None
            and data.validation_fraction == 0
        ):
            raise PydanticCustomError(
                RULE,
                "training.eval_steps is set, but there is nothing to validate on: "
                "add data.validation_fraction",
            )
        return value

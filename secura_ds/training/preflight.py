"""What is checked and set before anything large is loaded."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from secura_ds import environment
from secura_ds.backbones.adapter import refuse_stage
from secura_ds.errors import UserError
from secura_ds.reading import read_json
from secura_ds.recipe import Recipe, SequenceRecipe
from secura_ds.sharding import refuse_unsupported
from secura_ds.training.contradictions import contradictions, follow_recipe, misshapen

logger = logging.getLogger(__name__)

BAD_DEEPSPEED = {
    "0.19.2": "mixes data types when it gathers adapters under ZeRO-3 (DeepSpeed issue 8072)",
}
NON_REENTRANT_SINCE = (0, 19, 4)
SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def limit_threads() -> None:
    """Share the node's cores among its processes: more threads than cores slow every one of them down."""
    threads = environment.threads_per_process()
    if threads is not None:
        torch.set_num_threads(threads)


def deepspeed_settings(recipe: Recipe) -> dict[str, Any] | None:
    """The DeepSpeed configuration this process trains with; None for plain training on one device.

    Raises:
        UserError: several processes without a configuration, a configuration without a launcher, or a
            DeepSpeed version or setting that is known not to work or contradicts the recipe.
    """
    name = recipe.training.deepspeed
    if name is None:
        if environment.world_size() > 1:
            raise UserError(
                f"training.deepspeed is null, but {environment.world_size()} processes were launched: name "
                f'a configuration such as "deepspeed/zero3.json", or start one with python {_script()}'
            )
        return None
    if not environment.under_launcher():
        raise UserError(
            f'training.deepspeed is "{name}", but this is one process without a launcher: start it with '
            f"`deepspeed {_script()} ...`, or train on one device with --set training.deepspeed=null"
        )
    check_deepspeed_version(_installed_version())
    path = recipe.resolve_path(name)
    settings = read_json(path, remedy="name another DeepSpeed configuration or mend this one")
    _check_settings(settings, recipe, str(path))
    refuse_stage(recipe, settings["zero_optimization"]["stage"])
    return follow_recipe(settings, recipe, environment.world_size())


def _script() -> str:
    return f"launch/{'continual' if Path(sys.argv[0]).stem == 'continual' else 'train'}.py"


def check_deepspeed_version(version: str) -> None:
    """Raise a UserError for a DeepSpeed version that is known to train wrongly."""
    if version in BAD_DEEPSPEED:
        raise UserError(
            f"DeepSpeed {version} {BAD_DEEPSPEED[version]}: install another version, "
            'for example pip install "deepspeed>=0.19.8,<0.20"'
        )


def reentrant_checkpointing(settings: dict[str, Any] | None) -> bool:
    """Whether activation checkpoints must be of the reentrant kind.

    DeepSpeed before 0.19.4 freed partitioned weights that the other kind compares (DeepSpeed pull 8148).
    """
    if settings is None or settings["zero_optimization"]["stage"] != 3:
        return False
    return _numbers(_installed_version()) < NON_REENTRANT_SINCE


def check_machine(recipe: Recipe) -> None:
    """Compare the recipe with this machine, before anything is loaded.

    Raises:
        UserError: a data type or an optimizer that this machine has not, or a tracker that is not installed.
    """
    training, dtype, gpu = recipe.training, recipe.backbone.dtype, torch.cuda.is_available()
    for name in training.report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(f'training.report_to has "{name}", which is not installed: pip install {name}')
    if dtype == "float16" and not gpu:
        raise UserError('backbone.dtype is "float16", which needs a GPU: use "bfloat16" or "float32"')
    if dtype == "bfloat16" and gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        card = torch.cuda.get_device_name()
        raise UserError(f'backbone.dtype is "bfloat16", which {card} does not compute in: use "float16"')
    if training.optimizer.startswith("paged") and not gpu:
        raise UserError(
            f'training.optimizer is "{training.optimizer}", which pages its state out of a GPU, but there is '
            'none: use "adamw_torch" or "adamw_8bit"'
        )
    if training.activation_offloading and not gpu:
        logger.warning(
            "training.activation_offloading has no effect without a GPU: activations are in main memory"
        )


def check_examples(rows: int, recipe: Recipe | SequenceRecipe, of: str = "training data") -> None:
    """Refuse fewer rows than a step takes: the sampler would repeat some, which then count more than others.

    Args:
        rows: how many there are; with packing a row holds several examples.
        of: what they are of, in words.

    Raises:
        UserError: names both numbers.
    """
    training, ranks = recipe.training, environment.world_size()
    micro, passes = training.micro_batch_size, training.gradient_accumulation_steps
    if rows < micro * passes * ranks:
        raise UserError(
            f"there are {rows} rows of {of}, but a step takes {micro} x {passes} x {ranks} = "
            f"{micro * passes * ranks} (training.micro_batch_size, gradient_accumulation_steps, ranks): "
            "lower one of them, or add data"
        )


def _check_settings(settings: Any, recipe: Recipe, path: str) -> None:
    if problems := misshapen(settings):
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    stage = (settings.get("zero_optimization") or {}).get("stage")
    if stage not in (1, 2, 3):
        raise UserError(
            f"{path}: zero_optimization.stage is {stage!r}: 1, 2 or 3; for one device leave "
            "training.deepspeed null"
        )
    refuse_unsupported(settings, path)
    optimizer = recipe.training.optimizer
    if optimizer not in SHARDED_OPTIMIZERS:
        raise UserError(
            f'training.optimizer is "{optimizer}", whose state DeepSpeed cannot cut by parameter: '
            f"use one of {', '.join(SHARDED_OPTIMIZERS)} with training.deepspeed"
        )
    if problems := contradictions(settings, recipe, environment.world_size()):
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))


def _installed_version() -> str:
    return environment.package_version("deepspeed") or "0"


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts[:3] if part.isdigit())

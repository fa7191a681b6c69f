"""From a recipe to the Trainer's arguments."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from deepspeed import ops
from trl import SFTConfig

from secura_ds import environment
from secura_ds.recipe import Recipe

NEVER = 10**9  # a step no run reaches


def make_arguments(recipe: Recipe, folder: Path, settings: dict[str, Any] | None) -> SFTConfig:
    """The Trainer's arguments. Under a launcher the ranks are connected.

    With ZeRO-3 `settings`, models that are loaded while the result is alive are partitioned as they load.

    Args:
        folder: the run's folder.
        settings: the DeepSpeed configuration, from `preflight.deepspeed_settings`.
    """
    training, dtype = recipe.training, recipe.backbone.dtype
    on_cpus = settings is not None and not torch.cuda.is_available()
    if on_cpus:
        _start_cpu_ranks()
    arguments = SFTConfig(
        output_dir=str(folder),
        deepspeed=settings,
        use_cpu=not torch.cuda.is_available(),
        accelerator_config={"use_configured_state": on_cpus},
        # Without DeepSpeed the weights already have their type; only float16 gradients need scaling.
        bf16=settings is not None and dtype == "bfloat16",
        fp16=dtype == "float16",
        learning_rate=training.learning_rate,
        num_train_epochs=training.epochs or 1,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.micro_batch_size,
        per_device_eval_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        lr_scheduler_type=training.scheduler,
        warmup_steps=training.warmup_ratio,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optimizer,
        activation_checkpointing=training.gradient_checkpointing,
        activation_offloading=training.activation_offloading and torch.cuda.is_available(),
        seed=training.seed,
        logging_steps=training.logging_steps,
        # A loss that is not finite must show.
        logging_nan_inf_filter=False,
        eval_strategy="steps" if _validates(recipe) else "no",
        eval_steps=training.eval_steps or NEVER,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=training.save_steps or NEVER,
        train_sampling_strategy="batch_rebalance",
        padding_free=recipe.data.packing,
        packing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[name for name in training.report_to if name != "tensorboard"],
        disable_tqdm=True,
        log_level="warning",
    )
    if not environment.under_launcher():
        arguments._n_gpu = min(arguments.n_gpu, 1)  # never DataParallel
    # Otherwise every rank would train on the same examples.
    assert arguments.world_size == environment.world_size(), (arguments.world_size, environment.world_size())
    return arguments


def _start_cpu_ranks() -> None:
    """Have DeepSpeed and accelerate use the process group of a run without GPUs.

    By itself accelerate counts one process there.
    """
    # Another run in this process may have had another DeepSpeed configuration.
    AcceleratorState._reset_state()
    # It would be compiled for a minute, for a collective that training does not use.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")  # `limit_threads` has seen to it
        state = PartialState(cpu=True, backend="gloo")
    state.distributed_type = DistributedType.DEEPSPEED


def _validates(recipe: Recipe) -> bool:
    return recipe.data.validation is not None or recipe.data.validation_fraction > 0

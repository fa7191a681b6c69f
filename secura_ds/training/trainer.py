"""TRL's SFTTrainer with resumable state of our own, and a loss that never forms all logits at once."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from secura_ds import sharding
from secura_ds.backbones import head
from secura_ds.backbones.adapter import backbone_of
from secura_ds.backbones.head import IGNORED
from secura_ds.ranks import on_main
from secura_ds.training import checkpoint as files
from secura_ds.training import state as states
from secura_ds.training.checkpoint import Checkpoint
from secura_ds.training.model import trainable
from secura_ds.training.sampling import REPLAYED, Collator, StepSampler, marking, with_replay
from secura_ds.training.strategy import Strategy

logger = logging.getLogger(__name__)


class Trainer(SFTTrainer):
    """SFTTrainer on examples that are already tokenized, with our checkpoints in place of its own.

    Args:
        checkpoints: folder of the run's checkpoints.
        keep: how many of them stay.
        reentrant: kind of activation checkpointing.
        resumed: the checkpoint to go on from, and its folder.
        start: or what gives the prepared model the parameters that an earlier run has left.
        strategy: what continual learning adds.
    """

    data_collator: Collator

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        arguments: SFTConfig,
        tokenizer: PreTrainedTokenizerBase,
        train_dataset: Dataset,
        validation: Dataset | None,
        *,
        checkpoints: Path,
        keep: int,
        reentrant: bool,
        resumed: tuple[Path, Checkpoint] | None = None,
        start: Callable[[nn.Module], None] | None = None,
        strategy: Strategy | None = None,
    ) -> None:
        self.checkpoints, self.keep = checkpoints, keep
        self.start, self.strategy = start, strategy or Strategy()
        self.resumed_from = resumed[0] if resumed is not None else None
        self.resumed = resumed[1] if resumed is not None else None
        self.factors: files.Fingerprint | None = None
        self.sampler: StepSampler | None = None
        self.step_loss, self.step_tokens = 0.0, 0
        self.total_tokens, self.total_seconds = 0.0, 0.0
        self.began = time.perf_counter()
        exact = {name: parameter.data for name, parameter in trainable(model).items()}
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=with_replay(train_dataset, self.strategy.replay),
            eval_dataset=validation,
            processing_class=tokenizer,
        )
        self.data_collator = marking(self.data_collator)
        for name, parameter in trainable(model).items():
            # SFTTrainer casts what is trained on a 4-bit model to bfloat16, which loses small updates.
            if parameter.dtype != exact[name].dtype:
                parameter.data = exact[name]
        backbone = backbone_of(model)
        self.summed_loss = head.computes_summed_loss(backbone)
        if self.summed_loss:
            head.add_summed_loss(backbone)
        # SFTTrainer forces the reentrant kind under ZeRO-3, which DeepSpeed needs no longer.
        self.args.activation_checkpointing_kwargs = {"use_reentrant": reentrant}

    @property
    def batch_over_all_ranks(self) -> int:
        """Examples per optimizer step."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    # Order of examples.

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        self.sampler = StepSampler(
            train_dataset if train_dataset is not None else self.train_dataset,
            self.batch_over_all_ranks,
            ranks=self.args.world_size,
            rank=self.args.process_index,
            passes=self.args.gradient_accumulation_steps,
            seed=self.args.seed,
            replay=self.strategy.replay,
        )
        return self.sampler

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if REPLAYED not in self._signature_columns:
            self._signature_columns.append(REPLAYED)

    # The loss.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss per learnt token, over all ranks, and what the strategy adds to it in training."""
        plain = {key: value for key, value in inputs.items() if key != REPLAYED}
        if return_outputs or not model.training:
            return self._task_loss(model, plain, return_outputs, num_items_in_batch)
        compute = partial(self._task_loss, model, plain, False, num_items_in_batch)
        return self.strategy.loss(self, model, inputs, compute)

    def _task_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: Tensor | int | None,
    ) -> Any:
        """The loss of the examples. Families that `head` does not know go TRL's way."""
        if not self.summed_loss or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # The target of a position is the next token; the last position has none.
        targets = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
        loss = model(**{key: value for key, value in inputs.items() if key != "labels"}, targets=targets)
        if num_items_in_batch is None:
            return loss / (targets != IGNORED).sum().clamp(min=1)
        # The count is over all ranks, whose gradients are averaged.
        return loss / torch.as_tensor(num_items_in_batch).clamp(min=1) * self.accelerator.num_processes

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass; also counts tokens and adds up the step's loss."""
        mask = inputs.get("attention_mask")
        self.step_tokens += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        self.step_loss += float(loss)
        return loss

    # Checkpoints.

    def _save_checkpoint(self, model: nn.Module | None = None, trial: Any = None) -> None:
        snapshot, step = states.capture(self), self.state.global_step
        with ExitStack() as stack:
            opened = files.draft(self.checkpoints, step, keep=self.keep)
            draft = on_main(lambda: stack.enter_context(opened))
            for weights in states.folded_weights(self.model):
                on_main(partial(draft.add_folded, weights))
            size = on_main(lambda: draft.finish(snapshot, self.factors))
            on_main(stack.close)
        logger.info("saved %s: %s", files.folder_of(self.checkpoints, step), size)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            sharding.assert_partitioned(self.model)
        if self.resumed is not None and self.resumed_from is not None:
            states.restore(self, self.resumed, files.read_folded(self.resumed_from))
        elif self.start is not None:
            self.start(self.model)
        self.strategy.begin(self)
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """One pass over the data; none if the resumed checkpoint is the run's last."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: `_prepare_for_training` puts the checkpoint in, once DeepSpeed has the parameters."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        own = states.own_part(self.resumed) if self.resumed is not None else None
        if own is not None:
            states.set_random_state(own["random"])

    def state_json(self) -> str:
        """The Trainer's own state, as `TrainerState.load_from_json` reads it."""
        self.state.stateful_callbacks = {}
        return json.dumps(asdict(self.state), indent=2, sort_keys=True) + "\n"

    @property
    def run_seconds(self) -> float:
        """Seconds since the run began, those before an interruption with it but for the pause."""
        return time.perf_counter() - self.began

    def counters(self) -> dict[str, Any]:
        """What has been added up since the run began, or since the last line of the log."""
        return {
            "tokens": self.total_tokens,
            "seconds": self.total_seconds,
            "run_seconds": self.run_seconds,
            "last_logged": self._globalstep_last_logged,
        }

    def unlogged_loss(self) -> float:
        """This rank's losses added up since the last line of the log."""
        return float(self._tr_loss)

    def restore_counters(self) -> None:
        """Go on counting where the resumed checkpoint was; called once training has begun."""
        if self.resumed is None:
            return
        counters = self.resumed.state["counters"]
        self.total_tokens, self.total_seconds = counters["tokens"], counters["seconds"]
        self.began -= counters.get("run_seconds", 0.0)
        own = states.own_part(self.resumed)
        if own is not None:
            self._globalstep_last_logged = counters["last_logged"]
            self._tr_loss += own["loss"]

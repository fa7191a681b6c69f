"""The head and the loss, as the trainer computes them on each kind of device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

if TYPE_CHECKING:
    from secura_ds.plan.simulation import Work

Mark = Callable[[str, str, str], None]


def forward_and_backward(model: PeftModel, work: Work, device: str, mark: Mark) -> None:
    """One pass through `model`, a causal language model on the meta device, and back from its loss."""
    shape = (work.batch, work.length)
    ids = torch.empty(shape, dtype=torch.int64, device="meta")
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if work.packed:
        inputs["position_ids"] = torch.empty_like(ids)
    else:
        inputs["attention_mask"] = torch.empty_like(ids) if work.padded else None
    labels = torch.empty(work.learnt, dtype=torch.int64, device="meta")
    if device == "cpu":
        _at_learnt_positions(model, inputs, labels)
    else:
        _in_chunks(model, inputs, labels, mark)


def _at_learnt_positions(model: Any, inputs: dict[str, Any], labels: Tensor) -> None:
    """As `training.Trainer.compute_loss`: the head runs where something is learnt, with whole logits."""
    head = model.get_base_model().get_output_embeddings()

    def select(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (_Pick.apply(args[0], len(labels)),)

    handle = head.register_forward_pre_hook(select)
    try:
        # No name holds the logits: the trainer's own are gone when the backward pass begins.
        loss = F.cross_entropy(model(**inputs).logits.float(), labels, reduction="sum")
    finally:
        handle.remove()
    (loss / labels.new_ones(())).backward()


def _in_chunks(model: Any, inputs: dict[str, Any], labels: Tensor, mark: Mark) -> None:
    """TRL's fused head: log-probabilities of the learnt tokens, a tile of logits at a time."""
    from trl.kernels import chunked_logprob as fused
    from trl.trainer import utils

    base = model.get_base_model()
    head, config = base.get_output_embeddings(), base.config.get_text_config()
    name = next(n for n, module in model.named_modules() if module is head)

    def forward(**given: Any) -> dict[str, Tensor]:
        hidden = base.base_model(**given).last_hidden_state
        with _Gathered(mark, name):
            log_probs, *_ = fused.ChunkedLogProbFunction.apply(
                _Pick.apply(hidden, len(labels)),
                head.weight,
                head.bias,
                labels,
                1.0,
                utils._CHUNKED_LOGPROB_CHUNK_SIZE,
                getattr(config, "final_logit_softcapping", None),
                1.0,
                ("log_probs", "entropy", "is_top1"),
            )
        return {"log_probs": log_probs}

    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    with (
        # On a GPU these are kernels that work in place.
        mock.patch.object(fused, "_forward_tile", nothing),
        mock.patch.object(fused, "_backward_tile", nothing),
        mock.patch.object(fused, "_addmm_fp32", nothing),
        mock.patch.object(utils, "maybe_gather_lm_head_ctx", lambda *_: _Gathered(mark, name)),
        mock.patch.object(base, "forward", forward),
    ):
        (-model(**inputs)["log_probs"].sum()).backward()


class _Gathered:
    """Marks the time in which the head's weight is gathered outside a module's forward."""

    def __init__(self, mark: Mark, name: str) -> None:
        self.mark, self.name = mark, name

    def __enter__(self) -> None:
        self.mark("fetch", self.name, "head")

    def __exit__(self, *_: object) -> None:
        self.mark("release", self.name, "head")


class _Pick(torch.autograd.Function):
    """`hidden[:, :-1][learnt]` for a number of learnt positions: (count, width) of (batch, length, width)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, count: int) -> Tensor:
        ctx.shape = hidden.shape
        return hidden.new_empty(count, hidden.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        batch, length, width = ctx.shape
        scattered = gradients[0].new_zeros(batch, length - 1, width)
        widened = gradients[0].new_zeros(ctx.shape)
        del scattered
        return widened, None

"""The forward pass, the loss and the way back, as `training.Trainer` computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

from secura_ds.backbones import head
from secura_ds.backbones.adapter import backbone_of

if TYPE_CHECKING:
    from secura_ds.plan.simulation import Work

Mark = Callable[[str, str, str], None]


def forward_and_backward(model: nn.Module, work: Work, device: str, mark: Mark) -> None:
    """One pass through `model`, a causal language model on the meta device, and back from its loss."""
    shape = (work.batch, work.length)
    ids = torch.empty(shape, dtype=torch.int64, device="meta")
    inputs: dict[str, Any] = {"input_ids": ids}
    if work.packed:
        inputs["position_ids"] = torch.empty_like(ids)
    else:
        inputs["attention_mask"] = torch.empty_like(ids)
    base: Any = backbone_of(model)
    if head.computes_summed_loss(base):
        head.add_summed_loss(base)
        model(**inputs, targets=torch.empty_like(ids)).backward()
    else:
        with _fused_head(model, device, mark):
            model(**inputs, labels=ids, use_cache=False)["loss"].backward()


@contextmanager
def _fused_head(model: nn.Module, device: str, mark: Mark) -> Iterator[None]:
    """TRL's loss, for families that `backbones.head` does not know: log-probabilities by tiles of logits.

    On a GPU its kernels work in place and at the learnt tokens only, elsewhere it takes every token.
    """
    from trl.kernels import chunked_logprob as fused
    from trl.trainer import utils

    base: Any = backbone_of(model)
    linear, config = base.get_output_embeddings(), base.config.get_text_config()
    name = next(n for n, module in model.named_modules() if module is linear)

    def forward(labels: Tensor, **inputs: Any) -> dict[str, Tensor]:
        hidden, targets = base.base_model(**inputs).last_hidden_state[:, :-1], labels[:, 1:]
        learnt = targets != head.IGNORED
        flat = hidden[learnt] if device == "cuda" else hidden.reshape(-1, hidden.shape[-1])
        with _Gathered(mark, name):
            log_probs = fused.ChunkedLogProbFunction.apply(
                flat,
                linear.weight,
                linear.bias,
                targets[learnt] if device == "cuda" else targets.reshape(-1),
                1.0,
                utils._CHUNKED_LOGPROB_CHUNK_SIZE,
                getattr(config, "final_logit_softcapping", None),
                1.0,
                ("log_probs", "entropy", "is_top1"),
            )[0]
        return {"loss": -log_probs.sum()}

    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    with ExitStack() as stack:
        for kernel in ("_forward_tile", "_backward_tile", "_addmm_fp32") if device == "cuda" else ():
            stack.enter_context(mock.patch.object(fused, kernel, nothing))
        stack.enter_context(mock.patch.object(base, "forward", forward))
        gathered = mock.patch.object(utils, "maybe_gather_lm_head_ctx", lambda *_: _Gathered(mark, name))
        stack.enter_context(gathered)
        yield


class _Gathered:
    """Marks the time in which the head's weight is gathered outside a module's forward."""

    def __init__(self, mark: Mark, name: str) -> None:
        self.mark, self.name = mark, name

    def __enter__(self) -> None:
        self.mark("fetch", self.name, "head")

    def __exit__(self, *_: object) -> None:
        self.mark("release", self.name, "head")

"""Cross-entropy of a model's head in chunks of tokens: logits never exist for all tokens at once.

With a vocabulary of 128k or 256k the logits of a batch, and their gradient, are larger than every other
activation. Here the gradient of the hidden states is formed in the forward pass, chunk by chunk, and only
scaled in the backward pass: two matrix products per chunk, no logits kept, the head's weight read once.

Why not a library's: TRL's fused head forms the logits a second time in the backward pass, scores prompts as
well where there is no Triton, and needs several such chunks in fp32 there; torch's `linear_cross_entropy`
returns a bf16 loss for bf16 weights, copies the weight to fp32 on CPUs and knows no soft cap.

Shapes: hidden (tokens, width), weight (vocabulary, width), bias (vocabulary,), targets (tokens,) int64.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from secura_ds.backbones.family import FAMILIES
from secura_ds.sharding import is_quantized

CHUNK_TOKENS = 256
"""Rows of logits that exist at a time: enough that the products, not reading the weight, take the time."""

IGNORED = -100
"""The target of a token that is not learnt, as data collators write it."""
_CAP_ROWS = 16  # rows of a chunk whose soft cap is differentiated at a time
_FLOAT16_SCALE = 1024.0  # in fp16, probabilities below 6e-8 are 0


def chunk_bytes(tokens: int, vocabulary: int, element_size: int, *, softcap: bool = False) -> int:
    """Peak bytes of the logits and of all that is made of them, for weights of `element_size` bytes.

    One chunk in fp32, and in half precision or with a soft cap the product that it came from. The gradient
    of the hidden states is apart: (tokens, width), kept for the backward pass in the place of their copy.
    """
    rows = min(tokens, CHUNK_TOKENS)
    copies = 4 + (element_size if softcap or element_size < 4 else 0)
    return rows * vocabulary * copies + (min(rows, _CAP_ROWS) * vocabulary * 4 if softcap else 0)


def summed_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None = None
) -> Tensor:
    """The sum over tokens of -log softmax(cap(hidden weight^T + bias))[target], 0-d, in fp32.

    Differentiable in hidden, weight and bias; a gradient that nobody needs costs nothing.

    Args:
        softcap: logits z become softcap * tanh(z / softcap), in fp32.
    """
    if not torch.is_grad_enabled():
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    loss: Tensor = _SummedCrossEntropy.apply(hidden, weight, bias, targets, softcap)
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
    ) -> Tensor:
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype
        ctx.scale = _FLOAT16_SCALE if weight.dtype == torch.float16 else 1.0
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if for_hidden else None
        # Summed in fp32: in half precision a sum over chunks would drop what a single chunk adds.
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and for_bias else None
        for start in range(0, len(hidden), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            into = None if d_hidden is None else d_hidden[rows]
            losses[rows] = _chunk(
                hidden[rows], weight, bias, targets[rows, None], softcap, ctx.scale, (into, d_weight, d_bias)
            )
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        factor = gradients[0] / ctx.scale
        # In fp32, as a 0-d factor would first be rounded to the matrix's dtype.
        scaled = (
            None if gradient is None else gradient.float().mul(factor).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    softcap: float | None,
    scale: float,
    gradients: tuple[Tensor | None, ...],
) -> Tensor:
    """Losses (rows,) of one chunk; adds its part to the gradients wanted. All that is large ends with it."""
    d_hidden, d_weight, d_bias = gradients
    h = hidden.to(weight.dtype)
    z = torch.mm(h, weight.T) if bias is None else torch.addmm(bias, h, weight.T)
    losses, exponentials, sums = _losses(z, target, softcap)
    if all(gradient is None for gradient in gradients):
        return losses
    dz = _gradient(exponentials, sums, target, z, softcap, scale)
    if d_hidden is not None:
        d_hidden.copy_(torch.mm(dz, weight))
    if d_weight is not None:
        d_weight += torch.mm(dz.T, h)
    if d_bias is not None:
        d_bias += dz.sum(0, dtype=torch.float32)
    return losses


def _losses(z: Tensor, target: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (rows,), exp(z - max z) and its sums (rows, 1), in fp32; overwrites fp32 logits without cap."""
    if softcap is None:
        exponentials = z.float()
    else:
        exponentials = z.to(torch.float32, copy=True).div_(softcap).tanh_().mul_(softcap)
    exponentials.sub_(exponentials.amax(1, keepdim=True))
    at_target = exponentials.gather(1, target)
    sums = exponentials.exp_().sum(1, keepdim=True)
    return sums.log().sub_(at_target).squeeze(1), exponentials, sums


def _gradient(
    exponentials: Tensor, sums: Tensor, target: Tensor, z: Tensor, softcap: float | None, scale: float
) -> Tensor:
    """scale * d loss / d z = scale (softmax - one-hot) (1 - tanh(z / cap)^2), in the memory of z."""
    # (exp - sum) / sum at the target: 1 is subtracted before anything is rounded.
    exponentials.scatter_add_(1, target, -sums)
    if softcap is not None:
        for block, logits in zip(exponentials.split(_CAP_ROWS), z.split(_CAP_ROWS), strict=True):
            block.mul_(logits.to(torch.float32, copy=True).div_(softcap).tanh_().square_().neg_().add_(1.0))
    return z.copy_(exponentials.div_(sums / scale))


def computes_summed_loss(model: PreTrainedModel) -> bool:
    """True where this module knows all that the model does between hidden states and logits."""
    return model.config.model_type in FAMILIES and not is_quantized(_linear(model))


def add_summed_loss(model: PreTrainedModel) -> None:
    """Let `model(..., targets=targets)` return its summed loss, 0-d fp32, instead of logits.

    Targets (batch, length) int64 are those of the next token, `IGNORED` where nothing is learnt; the head
    runs at the others only, as a module, so that ZeRO-3 gathers its weight once and PEFT finds its copy.
    """
    linear = _linear(model)
    softcap = getattr(model.config, "final_logit_softcapping", None)
    of_model, of_linear = model.forward, linear.forward

    @functools.wraps(of_linear)
    def head(hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return of_linear(hidden)
        return summed_cross_entropy(hidden, linear.weight, linear.bias, targets, softcap)

    @functools.wraps(of_model)
    def forward(*args: Any, targets: Tensor | None = None, **kwargs: Any) -> Any:
        if targets is None:
            return of_model(*args, **kwargs)
        hidden = model.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        learnt = targets != IGNORED
        return model.get_output_embeddings()(hidden[learnt], targets[learnt])

    linear.forward, model.forward = head, forward


def _linear(model: PreTrainedModel) -> nn.Module:
    """The layer of the head that computes: PEFT's copy where the recipe trains it."""
    head = model.get_output_embeddings()
    return head.modules_to_save[head.active_adapters[0]] if isinstance(head, ModulesToSaveWrapper) else head

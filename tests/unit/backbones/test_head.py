"""The chunked loss is plain cross-entropy: value, gradients, memory, and every family's own loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from secura_ds.backbones import FAMILIES, head

TOY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.3,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**TOY),
    "qwen2": Qwen2Config(**TOY, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**TOY, final_logit_softcapping=3.0),
}


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float | None) -> Tensor:
    """The definition, in the precision of its arguments."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    return F.cross_entropy(logits, targets, reduction="sum")


def inputs(
    tokens: int, width: int, vocabulary: int, seed: int, *, bias: bool = True, spread: float = 1.0
) -> list[Tensor]:
    """hidden, weight, bias and targets; logits have a standard deviation of about `spread`."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * spread / width**0.5
    shift = torch.randn(vocabulary, generator=generator) if bias else torch.empty(0)
    return [hidden, weight, shift, torch.randint(vocabulary, (tokens,), generator=generator)]


def differentiated(
    function: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float | None
) -> list[Tensor]:
    """The loss and its gradients by hidden states, weight and bias, of three times the loss."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    loss = function(*leaves, *([None] * (3 - len(leaves))), targets, cap)
    return [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]


@settings(max_examples=60, deadline=None)
@example(tokens=1, width=1, vocabulary=25, chunk=1, bias=True, cap=None, spread=24.9375, seed=0)
@given(
    tokens=st.integers(0, 40),
    width=st.integers(1, 24),
    vocabulary=st.integers(2, 300),
    chunk=st.integers(1, 50),
    bias=st.booleans(),
    cap=st.none() | st.floats(0.5, 50),
    spread=st.floats(0.01, 30),
    seed=st.integers(0, 2**16),
)
def test_it_is_cross_entropy(
    tokens: int,
    width: int,
    vocabulary: int,
    chunk: int,
    bias: bool,
    cap: float | None,
    spread: float,
    seed: int,
) -> None:
    """In fp32 as exact as cross-entropy on whole logits is, both measured against fp64."""
    hidden, weight, shift, targets = inputs(tokens, width, vocabulary, seed, spread=spread)
    given = [hidden, weight, shift if bias else None]
    exact = differentiated(plain, *(None if x is None else x.double() for x in given), targets, cap)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CHUNK_TOKENS", chunk)
        found = differentiated(head.summed_cross_entropy, *given, targets, cap)
    reference = differentiated(plain, *given, targets, cap)
    # Rounding is relative to the terms of a sum: a loss near 0 is a difference of logits that may be large.
    terms = (
        (hidden.double() @ weight.double().T + (shift if bias else 0)).abs().max().item() if tokens else 0.0
    )
    for ours, whole, true in zip(found, reference, exact, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == true.shape
        size = true.abs().max().item() if true.numel() else 0.0
        error = (ours - true).abs().max().item() if true.numel() else 0.0
        floor = (whole - true).abs().max().item() if true.numel() else 0.0
        assert error <= 1e-6 * max(size, terms, 1.0) + 2 * floor


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_what_it_can(
    dtype: torch.dtype, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is fp32's of the rounded logits; gradients, summed over chunks, err by about one rounding."""
    monkeypatch.setattr(head, "CHUNK_TOKENS", 128)
    hidden, weight, _, targets = inputs(300, 64, 5000, 0, bias=False, spread=4.0)
    given = [hidden.to(dtype), weight.to(dtype), None]
    found = differentiated(head.summed_cross_entropy, *given, targets, cap)
    exact = differentiated(plain, *(None if x is None else x.double() for x in given), targets, cap)
    epsilon = torch.finfo(dtype).eps
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == dtype
    assert found[0].item() == pytest.approx(exact[0].item(), rel=epsilon)
    for ours, true in zip(found[1:], exact[1:], strict=True):
        assert torch.linalg.vector_norm(ours.double() - true) <= 2 * epsilon * torch.linalg.vector_norm(true)


def test_small_probabilities_reach_the_gradient_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens but the target are at 2e-8, which fp16 takes for 0; large hidden states make that matter."""
    vocabulary = 60_000
    hidden = torch.full((1, 16), 512.0, dtype=torch.float16)
    weight = torch.zeros(vocabulary, 16, dtype=torch.float16)
    weight[0] = 71 / 2**15  # the target's logit is 17.75, exactly
    target = torch.tensor([0])
    found = differentiated(head.summed_cross_entropy, hidden, weight, None, target, None)
    exact = differentiated(plain, hidden.double(), weight.double(), None, target, None)
    assert torch.allclose(found[2][1:].double(), exact[2][1:], rtol=0.01, atol=0)
    monkeypatch.setattr(head, "_FLOAT16_SCALE", 1.0)
    unscaled = differentiated(head.summed_cross_entropy, hidden, weight, None, target, None)
    assert not unscaled[2][1:].any()


def test_gradients_that_nobody_needs_are_not_formed() -> None:
    hidden, weight, _, targets = inputs(600, 32, 1000, 1, bias=False)
    weight.requires_grad_()
    with torch.no_grad():
        spent = peak_bytes(lambda: head.summed_cross_entropy(hidden, weight, None, targets))
    assert spent < head.chunk_bytes(600, 1000, 4) + weight.nbytes
    loss = head.summed_cross_entropy(hidden.requires_grad_(), weight.detach(), None, targets)
    loss.backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("vocabulary", [128_256, 256_000])
@pytest.mark.parametrize(
    ("dtype", "cap"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 30.0)]
)
def test_logits_exist_for_one_chunk_only(
    vocabulary: int, dtype: torch.dtype, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from the allocator's own events, forward and backward, for 8 chunks of tokens."""
    monkeypatch.setattr(head, "CHUNK_TOKENS", 32)
    tokens, width = 256, 8
    hidden, weight, _, targets = inputs(tokens, width, vocabulary, 0, bias=False)
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype)

    spent = peak_bytes(lambda: head.summed_cross_entropy(hidden, weight, None, targets, cap).backward())
    expected = head.chunk_bytes(tokens, vocabulary, dtype.itemsize, softcap=cap is not None)
    small = 8 * tokens * width * 4  # what grows with tokens x width
    assert expected - small <= spent <= expected * 1.01 + small
    whole = peak_bytes(lambda: plain(hidden, weight, None, targets, cap).backward())
    assert spent < whole / 7


def peak_bytes(call: Any) -> int:
    """The most bytes that were allocated at one time during `call`, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    held = peak = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_every_family_is_tested() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_family_s_loss_is_its_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the model's own logits and loss function, and its own forward pass is as before."""
    monkeypatch.setattr(head, "CHUNK_TOKENS", 7)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation="eager").eval()
    ids = torch.randint(97, (3, 9))
    labels = ids.masked_fill(torch.rand(3, 9) < 0.4, -100)
    whole = model(input_ids=ids, labels=labels, num_items_in_batch=1)
    gradient = torch.autograd.grad(whole.loss, list(model.model.parameters()))

    assert head.computes_summed_loss(model)
    head.add_summed_loss(model)
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    loss = model(input_ids=ids, targets=targets)
    assert loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    for ours, own in zip(torch.autograd.grad(loss, list(model.model.parameters())), gradient, strict=True):
        assert torch.allclose(ours, own, rtol=1e-4, atol=1e-4 * own.abs().max().item())
    assert torch.equal(model(input_ids=ids).logits, whole.logits)


def test_another_family_is_left_to_trl() -> None:
    """Its logits may be scaled in ways that are not known here."""
    from transformers import CohereConfig

    model = AutoModelForCausalLM.from_config(CohereConfig(**TOY, logit_scale=0.1))
    assert not head.computes_summed_loss(model)

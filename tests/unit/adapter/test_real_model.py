"""The tuner on SmolLM2-135M: speed of creation, and adapted against merged logits."""

from __future__ import annotations

import time

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from secura_ds import SecuraConfig
from secura_ds.adapter import secura_layers
from secura_ds.embedded import embedded_checkpoint


@torch.no_grad()
def test_adapted_and_merged_logits_agree_and_creation_is_fast() -> None:
    folder = embedded_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(
        "The capital of France is Paris.", return_tensors="pt"
    ).input_ids
    base = model(ids).logits
    start = time.thread_time()
    adapted = get_peft_model(model, SecuraConfig(target_modules="all-linear", smagnorm={"apply": "forward"}))
    # Processor time of this thread, so that other work on the machine does not count.
    assert time.thread_time() - start < 2.0
    layers = secura_layers(adapted)
    assert len(layers) == 210
    torch.testing.assert_close(adapted(ids).logits, base, rtol=0, atol=1e-3)
    for i, adapter in enumerate(layers.values()):
        generator = torch.Generator().manual_seed(i)
        adapter.secura_B["default"].copy_(torch.randn(96, 64, generator=generator).mul_(0.02))
    changed = adapted(ids).logits
    assert float((changed - base).abs().max()) > 0.5
    merged = adapted.merge_and_unload(safe_merge=True)
    assert float((merged(ids).logits - changed).abs().max()) == pytest.approx(0, abs=1e-4)

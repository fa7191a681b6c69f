"""The check at the end: strict load and the gap of the logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merge_toys import (
    make_base,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from secura_ds.errors import UserError
from secura_ds.merge import merge


def test_check_measures_the_gap_of_a_lora(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.float32)
    (base / "tokenizer.json").unlink()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "adapter")
    report = merge(base, tmp_path / "adapter", tmp_path / "out", progress=False)
    assert report.check_skipped is None
    assert report.max_logit_gap is not None and 0 <= report.max_logit_gap < 1e-5
    assert report.kl is not None and 0 <= report.kl < 1e-6
    assert isinstance(model, PeftModel)
    tokens = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits
        got = LlamaForCausalLM.from_pretrained(tmp_path / "out")(input_ids=tokens).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_check_is_strict_about_keys(base: Path, adapter: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(
        UserError, match=r"does not load strictly: 9 tensors .* the first is model\.layers\.2"
    ):
        merge(base, adapter, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_check_is_skipped_where_memory_is_short(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secura_ds.merge.check._cgroup_free", lambda: 1000)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    report = merge(base, adapter, tmp_path / "out", progress=False)
    assert report.max_logit_gap is None and report.check_skipped == "needs 0.5 GiB of free memory"

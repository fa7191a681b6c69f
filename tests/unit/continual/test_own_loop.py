"""Measuring models that are in memory, for people with a loop of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from calibration_toys import toy_llama, toy_tokenizer
from continual_toys import write_sequence_toy
from transformers import LlamaForCausalLM

from secura_ds.continual import evaluate, retention
from secura_ds.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_sequence_toy(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder / "backbone", dtype=torch.float32)


def test_tasks_of_a_model_in_memory(model: LlamaForCausalLM, folder: Path) -> None:
    found = evaluate(model, ["sizes", "sums"], task_folders=[folder / "tasks"], max_items=6, progress=False)
    assert list(found) == ["sizes", "sums"]
    assert found["sizes"]["n"] == 6 and found["sizes"]["chance"] == 0.5
    by_path = evaluate(model, [str(folder / "tasks/sizes.yaml")], max_items=6, progress=False)
    assert by_path["sizes"] == found["sizes"]
    assert model.training is False  # as it was


def test_a_model_keeps_all_of_itself(model: LlamaForCausalLM, folder: Path) -> None:
    probes = [folder / "knowledge.jsonl", folder / "general.txt"]
    found = retention(model, model, probes, progress=False)
    assert list(found) == ["knowledge", "general"]
    for value in found.values():
        assert value["change"] == {"value": 0.0, "stderr": 0.0}
        assert value["before"] == value["after"]
    assert "retention" in found["knowledge"] and "retention" not in found["general"]


def test_the_change_has_the_error_of_paired_items(folder: Path, tmp_path: Path) -> None:
    """Both models are far apart from item to item; their difference is nearly the same on every item."""
    before, after = toy_llama(), toy_llama()
    with torch.no_grad():
        after.lm_head.weight.mul_(1.02)
    (tmp_path / "text.txt").write_text("some words of a text that goes on and on, here and there. " * 60)
    found = retention(before, after, [tmp_path / "text.txt"], tokenizer=toy_tokenizer(), progress=False)
    change = found["text"]["change"]
    assert change["value"] == pytest.approx(
        found["text"]["after"]["value"] - found["text"]["before"]["value"]
    )
    assert 0 < change["stderr"] < found["text"]["before"]["stderr"]


def test_knowledge_above_chance_is_what_counts(tmp_path: Path) -> None:
    """A model that always takes the first choice knows half of a probe where every second is right."""
    rows = [{"question": f"q{i}", "choices": ["a", "b"], "answer": i % 2} for i in range(8)]
    (tmp_path / "k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = toy_llama()
    found = retention(model, model, [tmp_path / "k.jsonl"], tokenizer=toy_tokenizer(), progress=False)
    # Nobody can tell what was kept of a score that was that of guessing.
    assert 0.3 <= found["k"]["before"]["value"] <= 0.7
    assert found["k"]["retention"] is None


def test_what_cannot_be_measured(folder: Path) -> None:
    with pytest.raises(UserError, match="nothing.txt: no such file"):
        retention(toy_llama(), toy_llama(), ["nothing.txt"], tokenizer=toy_tokenizer())
    with pytest.raises(UserError, match="leads to no tokenizer: give it as tokenizer"):
        evaluate(toy_llama(), ["sums"], task_folders=[folder / "tasks"])

"""Scores of the embedded model: its own chat template and tokens, and a task that it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from secura_ds.data import encode, render_prompt
from secura_ds.embedded import embedded_checkpoint
from secura_ds.errors import UserError
from secura_ds.tasks import load_tasks, score_tasks
from secura_ds.tasks.harness import AskedModel

TASKS = Path(__file__).parents[3] / "recipes" / "tasks"


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return embedded_checkpoint()
    except UserError as error:
        pytest.skip(str(error))


def test_the_embedded_model_is_asked_what_it_is_trained_on(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tasks = load_tasks(["invented_facts", "roman_numerals"], [TASKS])
    found = score_tasks(model, tokenizer, tasks, max_items=2, batch_size=4, progress=False)
    assert found["roman_numerals"]["items"] == [0.0, 0.0]
    assert found["invented_facts"]["n"] == 2
    asked = AskedModel(model, tokenizer, 1, progress=False)
    for task in tasks:
        (example,) = task.held_out_examples(1)
        prompt, answer = (str(turn["content"]) for turn in example.messages)
        text = asked.apply_chat_template([{"role": "user", "content": prompt}])
        context, continuation = asked._encode_pair(text, answer)
        assert context == render_prompt(prompt, tokenizer)
        assert encode(example, tokenizer, max_length=999).input_ids == [
            *context, *continuation, tokenizer.eos_token_id
        ]  # fmt: skip

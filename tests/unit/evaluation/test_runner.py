from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_toys import byte_tokenizer, toy_model, write_jsonl

from secura_ds.data import render_prompt
from secura_ds.errors import UserError
from secura_ds.evaluation import evaluate
from secura_ds.evaluation.choice import likelihoods, multiple_choice, read_questions
from secura_ds.evaluation.task import end_tokens, generate
from secura_ds.evaluation.text import read_windows, text_loss
from secura_ds.recipe import EvaluationRecipe

TOKENIZER = byte_tokenizer()
MODEL = toy_model().requires_grad_(False)
QUESTION = {"question": "Which?", "choices": ["a", "bb", "cc"], "answer": 2, "topic": "letters"}


def test_likelihoods_equal_one_forward_per_choice() -> None:
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9, 8], [5, 5, 5, 5]]
    choices = [[[10], [11, 12, 13]], [[20, 21], [22], [23, 24, 25, 26]], [[30], [31]]]
    found = likelihoods(MODEL, TOKENIZER, prompts, choices)
    for prompt, group, values in zip(prompts, choices, found, strict=True):
        expected = []
        for choice in group:
            log_p = MODEL(input_ids=torch.tensor([prompt + choice])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(choice) - 1)
            expected.append(sum(float(log_p[p, token]) for p, token in zip(places, choice, strict=True)))
        assert values == pytest.approx(expected, abs=1e-4)


def test_multiple_choice_scores_by_both_likelihoods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    rows = [QUESTION, QUESTION | {"answer": 0, "topic": "other"}, QUESTION | {"answer": 1, "topic": None}]
    path = write_jsonl(tmp_path / "facts.jsonl", rows)
    # Choices have 2, 3 and 3 tokens: the first is likeliest, the last is likeliest for each of its tokens.
    monkeypatch.setattr(
        "secura_ds.evaluation.choice.likelihoods",
        lambda m, t, prompts, c: [np.array([-3, -9, -3.3])] * len(prompts),
    )
    found = multiple_choice(MODEL, TOKENIZER, path, None, 2, progress=False)
    assert (found["score"], found["score_per_token"]) == pytest.approx((1 / 3, 1 / 3))
    assert found["topics"] == {"letters": {"score": 0.0, "n": 1}, "other": {"score": 1.0, "n": 1}}
    assert (found["n"], found["chance"]) == (3, pytest.approx(1 / 3))
    assert multiple_choice(MODEL, TOKENIZER, path, 1, 2, progress=False)["score_per_token"] == 1.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "choices": ["b", "c"]}, r"facts\.jsonl:1: no answer; a row has question, choices"),
        (QUESTION | {"choices": ["b"]}, r":1: choices should be a list of two or more strings"),
        (QUESTION | {"answer": 3}, r":1: answer is 3; it is the index of the right choice, 0 to 2"),
        (QUESTION | {"answer": "cc"}, r":1: answer is 'cc'"),
    ],
)
def test_bad_questions_name_the_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_questions(write_jsonl(tmp_path / "facts.jsonl", [row]))


def test_text_loss_is_the_models_own_loss(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh" * 100)  # 800 tokens: three windows of 256
    windows = read_windows(TOKENIZER, path)
    assert [len(window) for window in windows] == [256, 256, 256]
    expected = [float(MODEL(input_ids=torch.tensor([w]), labels=torch.tensor([w])).loss) for w in windows]
    found = text_loss(MODEL, TOKENIZER, path, None, 8, progress=False)
    assert found["mean_token_loss"] == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert (found["n"], found["window"]) == (3, 256)
    first = text_loss(MODEL, TOKENIZER, path, 1, 8, progress=False)
    assert (first["n"], first["mean_token_loss"]) == (1, pytest.approx(expected[0], abs=1e-5))


def test_a_short_text_is_one_window_and_an_empty_one_an_error(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abc")
    assert [len(window) for window in read_windows(TOKENIZER, path)] == [3]
    path.write_text("")
    with pytest.raises(UserError, match=r"text\.txt: the text has 0 tokens"):
        read_windows(TOKENIZER, path)


def test_answers_do_not_depend_on_the_batch() -> None:
    prompts = [render_prompt("x" * n, TOKENIZER) for n in (1, 9, 4, 2)]
    alone = [generate(MODEL, TOKENIZER, [prompt], 12, 1, progress=False)[0] for prompt in prompts]
    assert generate(MODEL, TOKENIZER, prompts, 12, 3, progress=False) == alone
    assert len(set(alone)) > 1


def test_a_models_own_settings_do_not_change_greedy_answers() -> None:
    prompt, model = render_prompt("x", TOKENIZER), toy_model()
    expected = generate(model, TOKENIZER, [prompt], 24, 1, progress=False)
    model.generation_config.repetition_penalty = 3.0
    assert generate(model, TOKENIZER, [prompt], 24, 1, progress=False) == expected


def test_answers_end_at_eos_at_the_turns_end_and_where_the_model_says() -> None:
    tokenizer = byte_tokenizer(eos="<|endoftext|>")
    model = toy_model()
    model.generation_config.eos_token_id = [7]
    assert end_tokens(model, tokenizer) == [7, 256, 258]
    model.generation_config.eos_token_id = None
    assert end_tokens(model, byte_tokenizer(template=None)) == [258]


def test_the_document_has_all_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"{i}", "completion": json.dumps({"n": i})} for i in range(4)]
    write_jsonl(tmp_path / "task.jsonl", rows)
    write_jsonl(tmp_path / "facts.jsonl", [QUESTION] * 3)
    (tmp_path / "text.txt").write_text("abcd" * 10)
    answers = ['{"n":0}', '{"n": 1}', "{'n': 2}"]
    monkeypatch.setattr("secura_ds.evaluation.task.generate", lambda *_, **__: answers)
    recipe = EvaluationRecipe.model_validate(
        {
            "task": {"path": str(tmp_path / "task.jsonl"), "metric": "json_exact_match", "max_items": 3},
            "probes": [
                {"kind": "multiple_choice", "path": str(tmp_path / "facts.jsonl")},
                {"kind": "text_loss", "path": str(tmp_path / "text.txt")},
                {"kind": "multiple_choice", "path": str(tmp_path / "facts.jsonl"), "max_items": 1},
            ],
        }
    )
    model = toy_model().train()
    document = json.loads(json.dumps(evaluate(model, TOKENIZER, recipe, progress=False)))
    assert model.training
    task = document["task"]
    assert (task["metric"], task["n"], task["score"]) == ("json_exact_match", 3, pytest.approx(2 / 3))
    assert task["stderr"] == pytest.approx(math.sqrt(2 / 9 / 3), rel=0.05)
    assert task["examples"][2] == {
        "prompt": "2", "expected": '{"n": 2}', "answer": "{'n': 2}", "correct": False
    }  # fmt: skip
    assert [(name, probe["kind"], probe["n"]) for name, probe in document["probes"].items()] == [
        ("facts", "multiple_choice", 3), ("text", "text_loss", 1), ("facts-2", "multiple_choice", 1)
    ]  # fmt: skip


def test_a_backbone_without_a_template_is_asked_as_it_learns(tmp_path: Path) -> None:
    rows = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "a, b,", "completion": " c"}]
    recipe = EvaluationRecipe.model_validate({"task": {"path": str(write_jsonl(tmp_path / "t.jsonl", rows))}})
    tokenizer = byte_tokenizer(template=None)
    asked = [list(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    expected = generate(MODEL, tokenizer, asked, recipe.task.max_new_tokens, 2, progress=False)
    examples = evaluate(MODEL, tokenizer, recipe, progress=False)["task"]["examples"]
    assert [example["answer"] for example in examples] == expected


def test_a_task_row_without_an_answer_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "task.jsonl", [{"text": "only"}])
    recipe = EvaluationRecipe.model_validate({"task": {"path": str(path)}})
    with pytest.raises(UserError, match=r"task\.jsonl:1: a task row needs a prompt and an expected answer"):
        evaluate(MODEL, TOKENIZER, recipe, progress=False)

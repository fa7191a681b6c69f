"""What is learnt is what is asked: rows of the right split, and token for token the prompts of lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evaluation_toys import byte_tokenizer, toy_model
from task_toys import CHOICE, GENERATION, choice_row, write_rows, write_task

from secura_ds.data import Example, encode
from secura_ds.errors import UserError
from secura_ds.tasks import Task, load_tasks, score_tasks
from secura_ds.tasks.harness import AskedModel

FORMS = {
    "written": GENERATION,
    "chosen": CHOICE,
    "described": GENERATION + "description: 'Say {{{{completion[:3]}}}}.\\n'\n",
    "begun": GENERATION + "gen_prefix: 'It is'\n",
    "chosen and begun": CHOICE + "gen_prefix: 'It is'\n",
    "no delimiter": CHOICE + "target_delimiter: ''\n",
}


def prompts(examples: list[Example]) -> list[str]:
    return [str(example.messages[0]["content"]) for example in examples]


def asked_tokens(task: Task, template: bool, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What lm-eval has the model read: prompts, or of a choice each prompt with its continuation."""
    seen: list[list[int]] = []

    def generate(self: AskedModel, context: Any, max_length: int, stop: list[str], **given: Any) -> Any:
        rows = zip(context.tolist(), given["attention_mask"].tolist(), strict=True)
        seen.extend([[token for token, real in zip(*row, strict=True) if real] for row in rows])
        return context

    def likelihoods(self: AskedModel, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        seen.extend(context + continuation for _, context, continuation in requests)
        return [(0.0, False)] * len(requests)

    monkeypatch.setattr(AskedModel, "_model_generate", generate)
    monkeypatch.setattr(AskedModel, "_loglikelihood_tokens", likelihoods)
    score_tasks(toy_model(), tokenizer_for(template), [task], batch_size=2, progress=False)
    return seen


def tokenizer_for(template: bool) -> Any:
    return byte_tokenizer() if template else byte_tokenizer(template=None)


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_tokens_of_training_are_those_lm_eval_asks(
    tmp_path: Path, form: str, template: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (task,) = load_tasks([str(write_task(tmp_path, FORMS[form]))], [])
    tokenizer = tokenizer_for(template)
    seen = asked_tokens(task, template, monkeypatch)
    examples = task.held_out_examples(chat=template)
    assert len(seen) == len(examples) * (3 if task.is_choice else 1)
    for example in examples:
        learnt = encode(example, tokenizer, max_length=10_000)
        assert learnt.input_ids[-1] == tokenizer.eos_token_id
        if task.is_choice:
            assert learnt.input_ids[:-1] in seen
        else:
            begun = len(tokenizer("It is")["input_ids"]) if form == "begun" and template else 0
            prompt = learnt.labels.count(-100) + begun
            assert learnt.input_ids[:prompt] in seen
            assert learnt.num_learnt > 3


def test_the_prompt_is_a_turn_and_the_delimiter_is_for_plain_text(tmp_path: Path) -> None:
    (task,) = load_tasks([str(write_task(tmp_path, CHOICE))], [])
    chat, plain = task.held_out_examples(2)[1], task.held_out_examples(2, chat=False)[1]
    assert [turn["content"] for turn in chat.messages] == ["test 1?\nAnswer:", "cc"]
    assert [turn["content"] for turn in plain.messages] == ["test 1?\nAnswer:", " cc"]
    assert chat.where == "toy, scored row 2"


def test_validation_rows_are_cut_off_the_training_rows(tmp_path: Path) -> None:
    path = write_task(tmp_path, train=60)
    (task,) = load_tasks([str(path)], [])
    train, validation = prompts(task.training_examples()), prompts(task.validation_examples())
    assert (len(train), len(validation)) == (50, 10)
    assert set(train) | set(validation) == {f"train {i}?" for i in range(60)}
    assert train != sorted(train)
    assert prompts(task.held_out_examples()) == [f"test {i}?" for i in range(5)]
    assert prompts(task.training_examples(7)) == train[:7]
    (again,) = load_tasks([str(path)], [])
    assert prompts(again.training_examples()) == train


def test_a_validation_split_of_its_own_is_used_and_training_is_whole(tmp_path: Path) -> None:
    text = GENERATION.replace("test: test.jsonl", "test: test.jsonl, dev: dev.jsonl")
    path = write_task(tmp_path, text + "validation_split: dev\n", train=30)
    write_rows(tmp_path / "dev.jsonl", [{"prompt": f"dev {i}?", "completion": "x"} for i in range(4)])
    (task,) = load_tasks([str(path)], [])
    assert prompts(task.validation_examples(3)) == ["dev 0?", "dev 1?", "dev 2?"]
    assert len(task.training_examples()) == 30


def test_a_scored_validation_split_is_never_for_validation(tmp_path: Path) -> None:
    text = GENERATION.replace("test_split: test", "validation_split: test")
    (task,) = load_tasks([str(write_task(tmp_path, text))], [])
    assert all(prompt.startswith("train") for prompt in prompts(task.validation_examples()))
    assert prompts(task.held_out_examples(1)) == ["test 0?"]


def test_a_task_without_training_rows_can_only_be_scored(tmp_path: Path) -> None:
    (task,) = load_tasks([str(write_task(tmp_path, GENERATION.replace("training_split: train\n", "")))], [])
    assert len(task.held_out_examples()) == 5
    with pytest.raises(UserError, match="toy has no training split: it can be scored, but not trained on"):
        task.training_examples()


def test_chance_and_maximum_are_those_of_the_main_metric(tmp_path: Path) -> None:
    path = write_task(tmp_path / "a", CHOICE, name="chosen")
    rows = [choice_row("test", 0), choice_row("test", 1) | {"choices": ["a", "b"]}]
    write_rows(tmp_path / "a" / "test.jsonl", rows)
    bleu = GENERATION.replace("metric: exact_match", "metric: bleu\n  - metric: exact_match")
    chosen, written = load_tasks([str(path), str(write_task(tmp_path / "b", bleu, name="written"))], [])
    assert (chosen.metric, chosen.maximum, chosen.chance) == ("acc", 1.0, pytest.approx((1 / 3 + 1 / 2) / 2))
    assert (written.metric, written.maximum, written.chance) == ("bleu", 100.0, 0.0)


def test_a_row_without_a_right_choice_is_named_not_scored(tmp_path: Path) -> None:
    path = write_task(tmp_path, CHOICE)
    write_rows(tmp_path / "test.jsonl", [choice_row("test", 0), choice_row("test", 1) | {"answer": 3}])
    (task,) = load_tasks([str(path)], [])
    with pytest.raises(UserError, match="toy, scored row 2: the row has no right answer"):
        score_tasks(toy_model(), byte_tokenizer(), [task], progress=False)

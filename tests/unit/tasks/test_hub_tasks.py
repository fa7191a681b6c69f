"""Hub tasks by name: rows with the hub's columns become the prompts, answers and scores they should.

No data are fetched. Each fixture has one row with the columns that the task's file reads and that its data
set is known to have; what the hub serves today may differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from evaluation_toys import byte_tokenizer, toy_model

from secura_ds.tasks import load_tasks, score_tasks

TASKS = Path(__file__).parents[3] / "recipes" / "tasks"
LETTERS = {"label": ["A", "B"], "text": ["ice", "fire"]}
SPLITS = ("train", "validation", "test")

FIXTURES: dict[str, tuple[dict[str, Any], str, str]] = {
    "gsm8k": (
        {"question": "Two and two?", "answer": "2 + 2 = 4\n#### 4"},
        "Question: Two and two?\nAnswer:", "2 + 2 = 4\n#### 4",
    ),
    "cnn_dailymail": (
        {"article": "A long story." + "x" * 9000, "highlights": "One.\nTwo.", "id": "a"},
        "Summarize the article.\n\nA long story." + "x" * 3987 + "\n\nSummary:", "One. Two.",
    ),
    "news_de": (
        {"translation": {"de": "Guten Tag.", "en": "Good day."}},
        "Translate to German: Good day.", "Guten Tag.",
    ),
    "logiqa": (
        {"context": "C.", "query": "Q?", "options": ["w", "x", "y", "z"], "correct_option": 1},
        "Passage: C.\nQuestion: Q?\nAnswer:", "x",
    ),
    "arc_easy": (
        {"id": "a", "question": "What burns?", "choices": LETTERS, "answerKey": "B"},
        "Question: What burns?\nAnswer:", "fire",
    ),
    "arc_challenge": (
        {"id": "a", "question": "What burns?", "choices": LETTERS, "answerKey": "A"},
        "Question: What burns?\nAnswer:", "ice",
    ),
    "openbookqa": (
        {"id": "a", "question_stem": "What burns is", "choices": LETTERS, "answerKey": "B"},
        "What burns is", "fire",
    ),
    "commonsense_qa": (
        {
            "id": "a", "question": "Which?", "question_concept": "c", "answerKey": "C",
            "choices": {"label": list("ABCDE"), "text": ["v", "w", "x", "y", "z"]},
        },
        "Question: Which?\nA. v\nB. w\nC. x\nD. y\nE. z\nAnswer:", "C",
    ),
    "sciq": (
        {
            "question": "Q?", "distractor1": "a", "distractor2": "b", "distractor3": "c",
            "correct_answer": "d", "support": " S.",
        },
        "S.\nQuestion: Q?\nAnswer:", "d",
    ),
    "hellaswag": (
        {
            "ind": 1, "activity_label": "Running", "ctx_a": "She is out.", "ctx_b": "she", "label": "2",
            "endings": ["runs.", "sits.", "eats.", "sings."], "ctx": "She is out. she", "source_id": "s",
        },
        "Running: She is out. She", "eats.",
    ),
    "winogrande": (
        {"sentence": "Ann thanked Eva since _ helped.", "option1": "Ann", "option2": "Eva", "answer": "2"},
        "Ann thanked Eva since Eva", "helped.",
    ),
    "squad": (
        {
            "id": "a", "title": "t", "context": "It's Oslo.", "question": " Where? ",
            "answers": {"text": ["Oslo", "it's Oslo"], "answer_start": [5, 0]},
        },
        "It's Oslo.\nQuestion: Where?\nAnswer:", "Oslo",
    ),
    "drop_spans": (
        {
            "section_id": "s", "query_id": "q", "passage": "P.", "question": "How many?",
            "answers_spans": {"spans": ["4", "four"], "types": ["number", "span"]},
        },
        "P.\nQuestion: How many?\nAnswer:", "4",
    ),
    "xsum": (
        {"document": "A story.", "summary": "Short.", "id": "a"},
        "Summarize the article in one sentence.\n\nA story.\n\nSummary:", "Short.",
    ),
    "triviaqa": (
        {
            "question": "Who", "question_id": "q", "question_source": "s",
            "answer": {"aliases": ["Ann", "Anne"], "normalized_aliases": ["ann"], "value": "Ann"},
        },
        "Question: Who?\nAnswer:", "Ann",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXTURES)
def test_prompts_answers_splits_and_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, prompt, answer = FIXTURES[name]
    data = DatasetDict({split: Dataset.from_list([row] * 6) for split in SPLITS})
    monkeypatch.setattr("datasets.load_dataset", lambda **_: data)
    (task,) = load_tasks([name], [TASKS])
    assert task.needs_hub
    for examples in (task.training_examples(), task.validation_examples(), task.held_out_examples()):
        turns = [(turn["role"], turn["content"]) for turn in examples[0].messages]
        assert turns == [("user", prompt), ("assistant", answer)]
    if not task.is_choice:
        task.harness.set_config("generation_kwargs", {"max_gen_toks": 3}, update=True)
    model = toy_model()
    model.config.max_position_embeddings = 8192
    found = score_tasks(model, byte_tokenizer(), [task], max_items=2, progress=False)[name]
    assert (found["n"], found["metric"]) == (2, task.metric)
    assert 0 <= found["score"] <= found["maximum"]
    assert found["chance"] == pytest.approx(task.chance)
    assert task.is_choice == (task.chance > 0)


def test_every_hub_file_of_ours_has_a_fixture() -> None:
    assert {path.stem for path in (TASKS / "hub").glob("*.yaml")} <= set(FIXTURES)


def test_any_of_several_right_answers_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    data = DatasetDict({split: Dataset.from_list([FIXTURES["squad"][0]] * 2) for split in SPLITS})
    monkeypatch.setattr("datasets.load_dataset", lambda **_: data)
    (task,) = load_tasks(["squad"], [TASKS])
    answers = ["It's Oslo", "Bergen"]
    target = "lm_eval.models.huggingface.HFLM.generate_until"
    monkeypatch.setattr(target, lambda self, requests, disable_tqdm=False: answers)
    found = score_tasks(toy_model(), byte_tokenizer(), [task], progress=False)["squad"]
    assert found["items"] == [1.0, 0.0]


def test_a_number_after_the_sign_is_what_gsm8k_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    data = DatasetDict({split: Dataset.from_list([FIXTURES["gsm8k"][0]] * 3) for split in SPLITS})
    monkeypatch.setattr("datasets.load_dataset", lambda **_: data)
    (task,) = load_tasks(["gsm8k"], [TASKS])
    answers = ["I think\n#### 4", "it is 4", "#### 5"]
    target = "lm_eval.models.huggingface.HFLM.generate_until"
    monkeypatch.setattr(target, lambda self, requests, disable_tqdm=False: answers)
    found = score_tasks(toy_model(), byte_tokenizer(), [task], progress=False)["gsm8k"]
    assert found["items"] == [1.0, 0.0, 0.0]
    assert found["metrics"]["exact_match,flexible-extract"]["score"] == pytest.approx(2 / 3)

"""Examples of the task: the prompt, what was expected, and the answers before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secura_ds.report.run_folder import RunFolder

MAX_EXAMPLES = 24
MAX_CHARACTERS = 1500


@dataclass(frozen=True)
class Answer:
    """One model's answer; `correct` is None where its metric gives no verdict for a single item."""

    who: str
    text: str
    correct: bool | None


@dataclass(frozen=True)
class Example:
    """One item with all answers to it."""

    prompt: str
    expected: str
    answers: list[Answer]


def side_by_side(runs: Sequence[RunFolder]) -> tuple[list[Example], int]:
    """The first examples in file order (none are picked), and how many there were.

    Answers are matched by prompt. The backbone's answers come from the first run that has them.
    """
    columns = []
    start = next((run for run in runs if _examples(run.before)), None)
    if start is not None:
        columns.append(("before", _examples(start.before)))
    columns += [
        ("after" if len(runs) == 1 else run.label, _examples(run.after))
        for run in runs
        if _examples(run.after)
    ]
    prompts: dict[tuple[str, str], list[Answer]] = {}
    for who, examples in columns:
        for example in examples:
            key = (_text(example.get("prompt")), _text(example.get("expected")))
            correct = example.get("correct")
            answer = Answer(who, _text(example.get("answer")), correct if isinstance(correct, bool) else None)
            answers = prompts.setdefault(key, [])
            if all(answer.who != other.who for other in answers):
                answers.append(answer)
    shown = [Example(prompt, expected, answers) for (prompt, expected), answers in prompts.items()]
    return shown[:MAX_EXAMPLES], len(shown)


def _examples(evaluation: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    task = (evaluation or {}).get("task")
    examples = task.get("examples") if isinstance(task, Mapping) else None
    return [e for e in examples if isinstance(e, Mapping)] if isinstance(examples, list) else []


def _text(value: Any) -> str:
    text = "" if value is None else str(value)
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} … ({len(text) - MAX_CHARACTERS} more characters)"

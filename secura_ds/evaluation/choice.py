"""Multiple choice by likelihood: what the model knows, without asking it to write."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_ds.data.encoding import plain_tokens
from secura_ds.errors import UserError
from secura_ds.evaluation.batching import batches, check_enough, pad_left
from secura_ds.evaluation.metrics import bootstrap_stderr
from secura_ds.reading import read_rows


@dataclass(frozen=True)
class Question:
    """A question, its choices and the index of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: int
    topic: str | None


def read_questions(path: Path, max_items: int | None = None) -> list[Question]:
    """Rows `{"question", "choices", "answer", "topic"?}` of a JSONL file.

    Raises:
        UserError: a row is malformed; names the line. Or there are fewer than `max_items`.
    """
    rows = read_rows(path)
    check_enough(path, len(rows), "questions", max_items)
    return [_question(where, row) for where, row in rows[:max_items]]


def _question(where: str, row: Mapping[str, Any]) -> Question:
    if missing := [key for key in ("question", "choices", "answer") if key not in row]:
        raise UserError(
            f"{where}: no {', '.join(missing)}; a row has question, choices, answer and maybe topic"
        )
    choices, answer = row["choices"], row["answer"]
    strings = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
    if not strings or len(choices) < 2:
        raise UserError(f"{where}: choices should be a list of two or more strings, none empty")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(
            f"{where}: answer is {answer!r}; it is the index of the right choice, 0 to {len(choices) - 1}"
        )
    return Question(str(row["question"]), tuple(choices), answer, row.get("topic"))


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    max_items: int | None,
    batch_size: int,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Share of questions whose right choice is the likeliest continuation of `Question: ...\\nAnswer:`.

    `score` takes the choice of the highest log-likelihood, `score_per_token` that of the highest mean
    log-likelihood of a token. No chat template: this asks for knowledge, not for manners. `chance` is the
    expected score of guessing.

    Raises:
        UserError: the file is bad.
    """
    questions = read_questions(path, max_items)
    prompts, choices = tokens_of(tokenizer, questions)
    right = np.zeros((len(questions), 2))
    for batch in batches(prompts, batch_size, len, path.stem, progress=progress):
        found = likelihoods(model, tokenizer, [prompts[i] for i in batch], [choices[i] for i in batch])
        for i, values in zip(batch, found, strict=True):
            lengths = np.array([len(choice) for choice in choices[i]])
            right[i] = [int(v.argmax()) == questions[i].answer for v in (values, values / lengths)]
    return {
        "score": float(right[:, 0].mean()),
        "stderr": bootstrap_stderr(right[:, 0]),
        "score_per_token": float(right[:, 1].mean()),
        "n": len(questions),
        "chance": float(np.mean([1 / len(question.choices) for question in questions])),
        "topics": _by_topic(questions, right[:, 0]),
        "items": right[:, 0].astype(int).tolist(),
    }


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """The prompt of each question, and its choices as they follow it."""
    prompts = [plain_tokens(tokenizer, f"Question: {question.text}\nAnswer:") for question in questions]
    choices = [
        [tokenizer(f" {choice}", add_special_tokens=False)["input_ids"] for choice in question.choices]
        for question in questions
    ]
    return prompts, choices


def _by_topic(questions: Sequence[Question], right: np.ndarray) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for question, value in zip(questions, right, strict=True):
        if question.topic is not None:
            groups[question.topic].append(float(value))
    return {topic: {"score": float(np.mean(v)), "n": len(v)} for topic, v in sorted(groups.items())}


def likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
) -> list[np.ndarray]:
    """Log-likelihood of every choice after its prompt; one array a prompt.

    A prompt is read once: its keys and values are repeated for its choices, of which only the tokens before
    the last have to be read.
    """
    ids, mask = pad_left(prompts, tokenizer, model.device)
    output = model(
        input_ids=ids, attention_mask=mask, position_ids=_positions(mask), use_cache=True, logits_to_keep=1
    )
    owners = [row for row, group in enumerate(choices) for _ in group]
    flat = [choice for group in choices for choice in group]
    first = output.logits[:, -1].float().log_softmax(-1)
    scores = first[owners, [choice[0] for choice in flat]]
    longer = [row for row, choice in enumerate(flat) if len(choice) > 1]
    if longer:
        scores[longer] += _later_tokens(
            model,
            output.past_key_values,
            mask,
            [owners[row] for row in longer],
            [flat[row] for row in longer],
        )
    values = scores.double().cpu().numpy()
    ends = np.cumsum([len(group) for group in choices])[:-1]
    return list(np.split(values, ends))


def _later_tokens(
    model: PreTrainedModel, cache: Any, mask: Tensor, owners: list[int], choices: Sequence[Sequence[int]]
) -> Tensor:
    """Log-likelihood of each choice's tokens after its first: (choices,) fp32."""
    index = torch.tensor(owners, device=mask.device)
    cache.reorder_cache(index)
    width = max(len(choice) for choice in choices)
    tokens = torch.zeros(len(choices), width, dtype=torch.int64)
    present = torch.zeros_like(tokens)
    for row, choice in enumerate(choices):
        tokens[row, : len(choice)] = torch.tensor(choice)
        present[row, : len(choice)] = 1
    tokens, present = tokens.to(mask.device), present.to(mask.device)
    whole_mask = torch.cat([mask[index], present[:, :-1]], dim=1)
    logits = model(
        input_ids=tokens[:, :-1],
        attention_mask=whole_mask,
        position_ids=_positions(whole_mask)[:, 1 - width :],
        past_key_values=cache,
        use_cache=True,
    ).logits
    log_p = logits.float().log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return (log_p * present[:, 1:]).sum(1)


def _positions(mask: Tensor) -> Tensor:
    """Positions that start at 0 with a row's first real token."""
    return (mask.cumsum(1) - 1).clamp_min(0)

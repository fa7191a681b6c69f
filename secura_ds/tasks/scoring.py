"""Scores of a live model on tasks, measured by lm-eval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_ds.errors import UserError
from secura_ds.evaluation.metrics import bleu, bootstrap_stderr
from secura_ds.evaluation.runner import evaluating
from secura_ds.tasks.task import Task


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    max_items: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Score a model (plain, with an adapter, or sharded) on tasks: greedy answers, no examples in the prompt.

    Under ZeRO-3 every rank calls this and runs all the same batches, so that every gather meets its partners
    and all ranks return the same. The model's mode is left as it was, and so are the random generators.

    Args:
        max_items: of each task, the first so many scored rows.
        progress: show progress bars (on the main process).

    Returns:
        By task: `{"metric", "score", "stderr", "n", "chance", "maximum", "metrics", "items"}`. The score is
        the main metric's. `metrics` has `{"score", "stderr"}` of every one; a name has the filter added
        (`exact_match,strict-match`) where a task has several. `items` are the rows' values of the main metric
        if its score is their mean, else None.

    Raises:
        UserError: a scored row has no right answer; names the row.
    """
    if not tasks:
        return {}
    if max_items is not None and max_items < 1:
        raise UserError(f"max_items is {max_items}; score at least 1 item of each task, or None for all")
    for task in tasks:
        if task.is_choice:  # lm-eval would count a row without a right choice as wrong
            task.held_out_examples(max_items, chat=False)
    from secura_ds.tasks.harness import AskedModel, evaluate, quiet

    with evaluating(model), quiet():
        asked = AskedModel(model, tokenizer, batch_size, progress=progress)
        found = evaluate(
            lm=asked,
            task_dict={"tasks": {task.name: task.harness for task in tasks}},
            limit=max_items,
            bootstrap_iters=0,
            apply_chat_template=asked.has_template,
        )
    return {
        task.name: _account(task, found["results"][task.name], found["samples"][task.name]) for task in tasks
    }


def _account(task: Task, results: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    metrics: dict[str, dict[str, float | None]] = {}
    items: list[float] | None = None
    for metric, aggregate in task.harness.aggregation().items():
        for name in filters:
            score = results.get(f"{metric},{name}")
            if not isinstance(score, int | float):
                continue
            values = [sample[metric] for sample in samples if sample["filter"] == name and metric in sample]
            whole = _mean_of(values, score)
            main = not metrics
            items = whole if main else items
            stderr = _stderr(metric, values, whole, aggregate if main else None)
            key = metric if len(filters) == 1 else f"{metric},{name}"
            metrics[key] = {"score": float(score), "stderr": stderr}
    first = next(iter(metrics.values()))
    return {
        "metric": task.metric,
        **first,
        "n": len(samples) // len(filters),
        "chance": task.chance,
        "maximum": task.maximum,
        "metrics": metrics,
        "items": items,
    }


def _mean_of(values: Sequence[Any], score: float) -> list[float] | None:
    """The values of the rows, if they are numbers whose mean is the score."""
    if not all(isinstance(value, bool | int | float | np.number) for value in values):
        return None
    numbers = [float(value) for value in values]
    return numbers if abs(float(np.mean(numbers)) - score) < 1e-9 else None


def _stderr(
    metric: str,
    values: Sequence[Any],
    numbers: Sequence[float] | None,
    aggregate: Callable[[Sequence[Any]], float] | None,
) -> float | None:
    """Standard error: lm-eval's own of a mean, else by resampling, which only the main metric is worth."""
    from secura_ds.tasks.harness import mean_stderr

    if numbers is not None:
        return float(mean_stderr(numbers)) if len(numbers) > 1 else 0.0
    if metric == "bleu":
        references, answers = zip(*values, strict=True)
        return bleu(answers, references)[1]
    if aggregate is None:
        return None
    rows = np.arange(len(values))
    return bootstrap_stderr(rows, lambda picks: float(aggregate([values[int(i)] for i in picks])))

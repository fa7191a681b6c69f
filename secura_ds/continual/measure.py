"""What is measured before the first task and after each: every task, and every probe."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_ds.continual.places import task_files
from secura_ds.data import load_examples
from secura_ds.evaluation import Parts, answer_loss, evaluate
from secura_ds.files import atomic_write_json
from secura_ds.ranks import on_main
from secura_ds.recipe import EvaluationRecipe, SequenceRecipe, Source
from secura_ds.tasks import Task, score_tasks


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: SequenceRecipe,
    tasks: Sequence[Task],
    folder: Path,
    out: Path,
    *,
    learnt: str | None = None,
) -> None:
    """Measure `model` and write `out`, once all is there; an interrupted measurement goes on after its parts.

    Collective.

    Args:
        folder: the results folder, with the tasks' files.
        learnt: the task it has just learnt, whose validation loss is measured, too.
    """
    settings = recipe.evaluation
    parts = Parts(out.with_name(f".{out.name}.partial"), settings.model_dump(mode="json"))
    loss = partial(_loss, model, tokenizer, recipe)
    document: dict[str, Any] = {"tasks": {}, "probes": {}}
    for task in tasks:
        held_out = partial(loss, task_files(folder, task.name).held_out, f"{task.name}: loss")
        found = parts.measured(f"the loss of {task.name}", held_out)
        score = partial(_score, model, tokenizer, task, recipe)
        found |= parts.measured(f"the task {task.name}", score)
        document["tasks"][task.name] = found
    if learnt is not None:
        held_back = partial(loss, task_files(folder, learnt).validation, f"{learnt}: validation loss")
        found = parts.measured(f"the validation loss of {learnt}", held_back)
        document["validation_loss"] = found["loss"]
    probes = EvaluationRecipe(probes=settings.probes, batch_size=settings.batch_size)
    document["probes"] = evaluate(model, tokenizer, probes, recipe.resolve_path, parts=parts)["probes"]
    on_main(lambda: atomic_write_json(out, document))
    parts.forget()


def _loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: SequenceRecipe, path: Path, title: str
) -> dict[str, Any]:
    return answer_loss(
        model,
        tokenizer,
        load_examples(Source(path=str(path))),
        max_length=recipe.data.max_length,
        batch_size=recipe.evaluation.batch_size,
        title=title,
    )


def _score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, recipe: SequenceRecipe
) -> dict[str, Any]:
    settings = recipe.evaluation
    if not settings.scores:
        return {"score": None, "stderr": None}
    return score_tasks(
        model, tokenizer, [task], max_items=settings.max_items, batch_size=settings.batch_size
    )[task.name]

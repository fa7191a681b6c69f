"""What is measured before the first task and after each: every task, and every probe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_ds.continual.places import probe_file, task_files
from secura_ds.data import load_examples
from secura_ds.environment import is_main_process
from secura_ds.evaluation import Parts, answer_loss, evaluate
from secura_ds.files import atomic_write_json
from secura_ds.ranks import on_main
from secura_ds.recipe import EvaluationRecipe, Probe, SequenceRecipe, Source
from secura_ds.tasks import Task, score_tasks

Measurement = Callable[[], dict[str, Any]]


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
        folder: the results folder, with the tasks' and probes' files.
        learnt: the task it has just learnt, whose validation loss is measured, too.
    """
    settings = recipe.evaluation
    loss = partial(_loss, model, tokenizer, recipe)
    planned: dict[tuple[str, str], Measurement] = {}
    for task in tasks:
        planned["loss", task.name] = partial(loss, task_files(folder, task.name).held_out)
        if settings.scores:
            planned["task", task.name] = partial(_score, model, tokenizer, recipe, task)
    if learnt is not None:
        planned["validation", learnt] = partial(loss, task_files(folder, learnt).validation)
    for probe in settings.probes:
        planned["probe", Path(probe.path).stem] = partial(_probe, model, tokenizer, recipe, probe, folder)
    found = _measured(planned, out, settings.model_dump(mode="json"))
    document: dict[str, Any] = {
        "tasks": {t.name: found["loss", t.name] | found.get(("task", t.name), {}) for t in tasks},
        "probes": {name: value for (kind, name), value in found.items() if kind == "probe"},
    }
    if learnt is not None:
        document["validation_loss"] = found["validation", learnt]["loss"]
    on_main(lambda: atomic_write_json(out, document))


def _measured(
    planned: dict[tuple[str, str], Measurement], out: Path, inputs: dict[str, Any]
) -> dict[tuple[str, str], dict[str, Any]]:
    """Everything that is planned, under one progress line; what is done is kept until all is."""
    parts = Parts(out.with_name(f".{out.name}.partial"), inputs)
    found = {}
    shown = is_main_process()
    with tqdm(
        total=len(planned),
        desc="measuring",
        unit="part",
        disable=not shown,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 60,
    ) as bar:
        for (kind, name), action in planned.items():
            bar.set_postfix_str(f"{kind} {name}", refresh=sys.stderr.isatty())
            found[kind, name] = parts.measured(f"{kind} {name}", action)
            bar.update()
    parts.forget()
    return found


def _loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: SequenceRecipe, path: Path
) -> dict[str, Any]:
    return answer_loss(
        model,
        tokenizer,
        load_examples(Source(path=str(path))),
        max_length=recipe.data.max_length,
        batch_size=recipe.evaluation.batch_size,
    )


def _score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: SequenceRecipe, task: Task
) -> dict[str, Any]:
    settings = recipe.evaluation
    scores = score_tasks(
        model,
        tokenizer,
        [task],
        max_items=settings.max_items,
        batch_size=settings.batch_size,
        progress=False,
    )
    return scores[task.name]


def _probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: SequenceRecipe,
    probe: Probe,
    folder: Path,
) -> dict[str, Any]:
    one = EvaluationRecipe(probes=[probe], batch_size=recipe.evaluation.batch_size)
    probes = evaluate(model, tokenizer, one, partial(probe_file, folder), progress=False)["probes"]
    found: dict[str, Any] = next(iter(probes.values()))
    return found

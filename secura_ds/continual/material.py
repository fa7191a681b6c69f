"""The examples of the tasks and the probes, kept in the results folder: every sequence has the same ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from secura_ds.continual.places import probe_file, task_files
from secura_ds.data import Example
from secura_ds.errors import UserError
from secura_ds.files import atomic_write_text
from secura_ds.reading import read_text
from secura_ds.recipe import SequenceRecipe
from secura_ds.tasks import Task


def write_material(tasks: Sequence[Task], recipe: SequenceRecipe, folder: Path, *, chat: bool) -> None:
    """Write what is learnt, validated and scored of each task, and the probes. Main process only.

    Args:
        chat: whether the backbone has a chat template, by which lm-evaluation-harness words its prompts.

    Raises:
        UserError: the folder holds other examples of a task or another probe, from an earlier run; a probe's
            file is missing.
    """
    most, scored = recipe.data.max_examples, recipe.evaluation.max_items
    for task in tasks:
        files = task_files(folder, task.name)
        _write(files.train, task.training_examples(most, chat=chat))
        _write(files.validation, task.validation_examples(scored, chat=chat))
        _write(files.held_out, task.held_out_examples(scored, chat=chat))
    for probe in recipe.evaluation.probes:
        _keep(probe_file(folder, probe.path), read_text(recipe.resolve_path(probe.path)), "probe")


def _write(path: Path, examples: Sequence[Example]) -> None:
    text = "".join(json.dumps(row_of(example), ensure_ascii=False) + "\n" for example in examples)
    _keep(path, text, "task")


def _keep(path: Path, text: str, what: str) -> None:
    if not path.is_file():
        atomic_write_text(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise UserError(
            f"{path} is not what the {what} holds now: restore the {what}'s files, or start anew with "
            "--overwrite"
        )


def row_of(example: Example) -> dict[str, object]:
    """An example as a row that `secura_ds.data` reads."""
    if example.text is not None:
        return {"text": example.text}
    if example.is_pair:
        prompt, completion = (message["content"] for message in example.messages)
        return {"prompt": prompt, "completion": completion}
    return {"messages": list(example.messages)}

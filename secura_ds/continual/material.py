"""The examples of the tasks and the probes, kept in the results folder: every sequence has the same ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from secura_ds.continual.places import probe_file, task_files
from secura_ds.data import Example
from secura_ds.errors import UserError
from secura_ds.evaluation import read_probe
from secura_ds.files import atomic_write_text
from secura_ds.reading import read_text
from secura_ds.recipe import SequenceRecipe
from secura_ds.tasks import Task
from secura_ds.training.preflight import check_examples


def gather_material(
    tasks: Sequence[Task], recipe: SequenceRecipe, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> dict[Path, str]:
    """What is learnt, validated and scored of each task, and the probes: files of `folder`, not yet written.

    Raises:
        UserError: a task has fewer examples than a step takes; a probe's file is missing, malformed, or
            shorter than asked for.
    """
    made: dict[Path, str] = {}
    most, scored = recipe.data.max_examples, recipe.evaluation.max_items
    # lm-evaluation-harness words its prompts by whether there is a template.
    chat = tokenizer.chat_template is not None
    for task in tasks:
        files = task_files(folder, task.name)
        learnt = task.training_examples(most, chat=chat)
        if not recipe.data.packing:
            check_examples(len(learnt), recipe, f"the task {task.name}")
        made[files.train] = _lines(learnt)
        made[files.validation] = _lines(task.validation_examples(scored, chat=chat))
        made[files.held_out] = _lines(task.held_out_examples(scored, chat=chat))
    for probe in recipe.evaluation.probes:
        source = recipe.resolve_path(probe.path)
        read_probe(probe, source, tokenizer)
        made[probe_file(folder, probe.path)] = read_text(source)
    return made


def write_material(made: Mapping[Path, str]) -> None:
    """Write what is not there yet.

    Raises:
        UserError: the folder holds other examples of a task or another probe, from an earlier run.
    """
    for path, text in made.items():
        if not path.is_file():
            atomic_write_text(path, text)
        elif path.read_text(encoding="utf-8") != text:
            what = "task" if path.parent.name == "tasks" else "probe"
            raise UserError(
                f"{path} is not what the {what} holds now: restore the {what}'s files, or start anew with "
                "--overwrite"
            )


def _lines(examples: Sequence[Example]) -> str:
    return "".join(json.dumps(row_of(example), ensure_ascii=False) + "\n" for example in examples)


def row_of(example: Example) -> dict[str, object]:
    """An example as a row that `secura_ds.data` reads."""
    if example.text is not None:
        return {"text": example.text}
    if example.is_pair:
        prompt, completion = (message["content"] for message in example.messages)
        return {"prompt": prompt, "completion": completion}
    return {"messages": list(example.messages)}

"""All measurements of a recipe on one model, as one JSON-able document."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_ds.evaluation.choice import multiple_choice, read_questions
from secura_ds.evaluation.parts import Parts
from secura_ds.evaluation.task import score_task
from secura_ds.evaluation.text import read_windows, text_loss
from secura_ds.recipe import EvaluationRecipe, Probe
from secura_ds.sharding import gathered_forward

logger = logging.getLogger(__name__)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    evaluation: EvaluationRecipe,
    resolve_path: Callable[[str], Path] = Path,
    *,
    progress: bool = True,
    parts: Parts | None = None,
) -> dict[str, Any]:
    """Score `model` (plain, with an adapter, or sharded) on the recipe's task and probes.

    Under ZeRO-3 every rank calls this and runs all the same batches, so that every gather meets its partners
    and all ranks return the same document; more ranks make it no faster. The model's mode is left as it was.

    Args:
        resolve_path: turns a path of the recipe into a place on disk (`recipe.resolve_path`).
        progress: show progress bars (on the main process).
        parts: keeps what is finished, and gives what an interrupted evaluation had finished.

    Returns:
        `{"task": {"metric", "score", "stderr", "n", "examples"} | None, "probes": {name: {"kind", ...}}}`;
        a probe's name is the stem of its file, and its `items` are the scores of the single items, so that
        two evaluations can be compared item by item.

    Raises:
        UserError: a task's or probe's file is bad; names the place.
    """
    document: dict[str, Any] = {"task": None, "probes": {}}
    with evaluating(model):
        size = evaluation.batch_size
        if (task := evaluation.task) is not None:
            document["task"] = _part(
                parts,
                "the task",
                lambda: score_task(model, tokenizer, task, resolve_path, size, progress=progress),
            )
        for probe in evaluation.probes:
            path = resolve_path(probe.path)
            name = _free_name(path.stem, document["probes"])
            measure = partial(_run_probe, model, tokenizer, probe, path, size, progress=progress)
            document["probes"][name] = _part(parts, f"the probe {name}", measure)
    return document


def _part(parts: Parts | None, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return measure() if parts is None else parts.measured(name, measure)


def _run_probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probe: Probe,
    path: Path,
    batch_size: int,
    *,
    progress: bool,
) -> dict[str, Any]:
    measure = multiple_choice if probe.kind == "multiple_choice" else text_loss
    return {"kind": probe.kind} | measure(
        model, tokenizer, path, probe.max_items, batch_size, progress=progress
    )


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block forwards need no gradients, drop nothing out and see whole weights."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), gathered_forward(model):
            yield
    finally:
        model.train(was_training)


def read_probe(probe: Probe, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Read a probe's file as `evaluate` will, and measure nothing.

    Raises:
        UserError: the file is missing, malformed, or has fewer items than asked for; names the place.
    """
    if probe.kind == "multiple_choice":
        read_questions(path, probe.max_items)
    else:
        read_windows(tokenizer, path, probe.max_items)


def _free_name(stem: str, taken: dict[str, Any]) -> str:
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    return name

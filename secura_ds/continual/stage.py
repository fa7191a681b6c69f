"""One task of a sequence: the recipe of its run, and the strategy with what earlier tasks left to it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from secura_ds.backbones import load_config
from secura_ds.continual import strategies
from secura_ds.continual.places import stage_places, task_files
from secura_ds.data import build_datasets
from secura_ds.errors import UserError, first_line
from secura_ds.files import atomic_write_text, save_tensors
from secura_ds.plan.blueprint import draw
from secura_ds.ranks import on_main
from secura_ds.recipe import (
    DataRecipe,
    ElasticWeights,
    Entry,
    ExperienceReplay,
    InterpolatedLora,
    Protection,
    Recipe,
    Sequence,
    SequenceRecipe,
    Source,
)
from secura_ds.training import checkpoint
from secura_ds.training.state import STRATEGY
from secura_ds.training.strategy import Replay, Strategy
from secura_ds.training.trainer import Trainer

logger = logging.getLogger(__name__)


def stage_recipe(recipe: SequenceRecipe, sequence: Sequence, number: int, folder: Path) -> Recipe:
    """The recipe of the run for the task at position `number`; launch/train.py could run it as well."""
    task = sequence.order[number]
    # Not validated: the file need not be there yet.
    source = Source.model_construct(path=str(task_files(folder, task).train))
    data = DataRecipe.model_construct(
        sources=[source], seed=sequence.seed, **recipe.data.model_dump(exclude={"max_examples"})
    )
    return _recipe(
        recipe,
        name=f"{sequence.entry.name}-{task}",
        adapter=sequence.entry.adapter.model_dump(),
        data=data,
        training={
            **recipe.training.model_dump(),
            "output_dir": str(stage_places(folder, sequence, number).run),
            "learning_rate": sequence.learning_rate,
            "seed": sequence.seed,
        },
    )


def entry_recipes(recipe: SequenceRecipe, folder: Path) -> Iterator[tuple[Entry, Recipe]]:
    """Each entry with the recipe of its first run: the others take as much."""
    sequences = {sequence.entry.name: sequence for sequence in reversed(list(recipe.sequences()))}
    for entry in recipe.entries:
        yield entry, stage_recipe(recipe, sequences[entry.name], 0, folder)


def check_entries(recipe: SequenceRecipe, folder: Path, *, sharded: bool) -> None:
    """Refuse an entry whose adapter does not fit the backbone, before hours go into those before it.

    Args:
        sharded: DeepSpeed owns the parameters.

    Raises:
        UserError: names the entry.
    """
    config = load_config(recipe.backbone)
    for entry, first in entry_recipes(recipe, folder):
        try:
            draw(first, config, sharded=sharded)
        except UserError as error:
            raise UserError(f"entry {entry.name}: {error}") from error
        except Exception as error:
            # An architecture of the hub's own may do what the meta device cannot.
            logger.debug("entry %s cannot be checked beforehand: %s", entry.name, first_line(error))


def _recipe(recipe: SequenceRecipe, **sections: Any) -> Recipe:
    evaluation = {
        "probes": [probe.model_dump() for probe in recipe.evaluation.probes],
        "batch_size": recipe.evaluation.batch_size,
    }
    made = Recipe.model_validate(
        {"backbone": recipe.backbone.model_dump(), "evaluation": evaluation, **sections},
        context={"folder": recipe.folder},
    )
    made._folder = recipe.folder
    return made


def make_strategy(
    recipe: SequenceRecipe,
    sequence: Sequence,
    number: int,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> Strategy:
    """The strategy for the task at position `number`, with what the tasks before it left.

    Collective: the main process writes the buffer's examples down.
    """
    settings = sequence.entry.strategy
    before = stage_places(folder, sequence, number - 1) if number else None
    if isinstance(settings, ExperienceReplay | InterpolatedLora):
        replay = None
        if number:
            rows = _buffer(settings.buffer_size, recipe, sequence, number, folder, tokenizer)
            replay = Replay(rows, settings.per_step)
        if isinstance(settings, ExperienceReplay):
            return strategies.ExperienceReplay(replay)
        memory = None
        if before is not None:
            memory = _kept_memory(before.run)
        return strategies.InterpolatedLora(
            replay, decay=settings.ema_decay, weight=settings.consistency, memory=memory
        )
    if isinstance(settings, ElasticWeights):
        anchors = strategies.Anchors.from_tensors(load_file(before.anchors)) if before is not None else None
        return strategies.ElasticWeights(
            settings.penalty, anchors, settings.decay if settings.online else None
        )
    return Strategy()


def _kept_memory(run: Path) -> dict[str, Any]:
    """The long-term memory in the last checkpoint of the run before."""
    found = checkpoint.latest(run / "checkpoints")
    assert found is not None, run  # the same checkpoint that training begins with
    tensors = checkpoint.read(found).trained
    return {n.removeprefix(STRATEGY): value for n, value in tensors.items() if n.startswith(STRATEGY)}


def earlier_examples(
    recipe: SequenceRecipe,
    sequence: Sequence,
    number: int,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> Dataset | None:
    """What the calibration for the task at position `number` keeps clear of; None if of nothing.

    Collective: the main process writes the buffer's examples down.
    """
    settings = sequence.entry.strategy
    if not isinstance(settings, Protection) or not number:
        return None
    return _buffer(settings.buffer_size, recipe, sequence, number, folder, tokenizer)


def _buffer(
    size: int,
    recipe: SequenceRecipe,
    sequence: Sequence,
    number: int,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> Dataset:
    """Write down which examples of the tasks before are kept, and read them."""
    path = stage_places(folder, sequence, number).buffer

    def write() -> None:
        texts = [
            task_files(folder, task).train.read_text(encoding="utf-8") for task in sequence.order[:number]
        ]
        # Not splitlines, which takes a line separator inside a string for the end of a line.
        kept = strategies.buffered([t.split("\n")[:-1] for t in texts], size, sequence.seed)
        atomic_write_text(path, "".join(f"{line}\n" for line in kept))

    on_main(write)
    return _rows(recipe, sequence, number, folder, path, tokenizer)


def _rows(
    recipe: SequenceRecipe,
    sequence: Sequence,
    number: int,
    folder: Path,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> Dataset:
    """The examples of a file, one a row, as the task at position `number` would learn them."""
    stage = stage_recipe(recipe, sequence, number, folder)
    sources = [stage.data.sources[0].model_copy(update={"path": str(path)})]
    data = stage.data.model_copy(update={"sources": sources, "packing": False})
    rows, _, _ = build_datasets(stage.model_copy(update={"data": data}), tokenizer)
    return rows


def carry_on(recipe: SequenceRecipe, sequence: Sequence, number: int, folder: Path, trainer: Trainer) -> None:
    """Write down what the strategy needs of this task for those after it. Collective."""
    settings, strategy = sequence.entry.strategy, trainer.strategy
    if number == len(sequence.order) - 1 or not isinstance(settings, ElasticWeights):
        return
    assert isinstance(strategy, strategies.ElasticWeights)
    path = stage_places(folder, sequence, number).anchors
    if on_main(path.is_file):
        return
    task = task_files(folder, sequence.order[number]).train
    rows = _rows(recipe, sequence, number, folder, task, trainer.processing_class)
    chosen = rows.shuffle(seed=sequence.seed).select(range(min(settings.fisher_examples, len(rows))))
    fisher = strategies.fisher_information(trainer, chosen.to_list())
    anchors = strategies.joined(strategy.anchors, fisher, strategies.values_of(trainer), strategy.decay)
    on_main(lambda: save_tensors(path, anchors.to_tensors()))

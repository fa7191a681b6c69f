"""Task sequences from a recipe to a results folder; they go on wherever they were interrupted."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from secura_ds.backbones import load_model, load_tokenizer
from secura_ds.continual import folder as folders
from secura_ds.continual.material import gather_material, write_material
from secura_ds.continual.measure import measure
from secura_ds.continual.places import StagePlaces, shared_calibration, stage_places
from secura_ds.continual.results import diverged_mark, mark_diverged, write_results
from secura_ds.continual.stage import (
    carry_on,
    check_entries,
    earlier_examples,
    make_strategy,
    stage_recipe,
)
from secura_ds.errors import Diverged, UserError
from secura_ds.files import remove_folder
from secura_ds.ranks import on_main
from secura_ds.recipe import Sequence, SequenceRecipe
from secura_ds.tasks import Task, load_tasks
from secura_ds.training import folder as runs
from secura_ds.training.callbacks import Signals, StopRequested, asking
from secura_ds.training.model import to_device
from secura_ds.training.release import release
from secura_ds.training.run import Stage, train
from secura_ds.training.session import Session, session
from secura_ds.training.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SequencesSummary:
    """What became of the sequences of a recipe."""

    planned: int
    finished: int
    diverged: int
    signal: int | None = None
    """The signal that interrupted them."""


@dataclass(frozen=True)
class Share:
    """Every `of`-th sequence, from the one at `number`, from 1."""

    number: int
    of: int


def run_sequences(
    recipe: SequenceRecipe, *, resume: bool = False, overwrite: bool = False, share: Share | None = None
) -> SequencesSummary:
    """Train and measure every sequence of the recipe; every rank of a launched run calls this.

    Args:
        resume: go on in the results folder after what is finished there; from the start if it holds nothing.
        overwrite: delete what the results folder holds.
        share: the part of the sequences that this run takes, beside others that work in the same folder.

    Raises:
        UserError: anything the user can mend, the same on every rank; what is finished stays as it is.
    """
    folder = Path(recipe.output_dir).absolute()
    sequences = list(recipe.sequences())
    if share is not None:
        sequences = sequences[share.number - 1 :: share.of]
        if not sequences:
            raise UserError(
                f"--share {share.number}/{share.of}: the recipe has too few sequences for so many parts: "
                "divide them by less"
            )
    tokenizer = load_tokenizer(recipe.backbone)
    tasks = load_tasks(recipe.tasks, [recipe.resolve_path(path) for path in recipe.task_folders])
    with session(stage_recipe(recipe, sequences[0], 0, folder), folder) as opened:
        on_main(lambda: folders.check(recipe, folder, resume=resume, overwrite=overwrite))
        on_main(lambda: check_entries(recipe, folder, sharded=opened.settings is not None))

        def prepare() -> None:
            made = gather_material(tasks, recipe, folder, tokenizer)
            folders.open_folder(recipe, folder, overwrite=overwrite, alone=share is None)
            write_material(made)

        on_main(prepare)
        # One of several measures it; the others have sequences to train meanwhile.
        first = share is None or share.number == 1
        signal = _measure_backbone(recipe, tasks, folder, tokenizer, opened) if first else None
    finished = diverged = 0
    for number, sequence in enumerate(sequences, start=1):
        if signal is not None:
            break
        logger.info("sequence %d of %d: %s", number, len(sequences), sequence.label)
        try:
            signal = _run_sequence(recipe, sequence, tasks, folder, tokenizer)
            finished += signal is None
        except Diverged as error:
            logger.warning("%s: %s", sequence.label, error)
            on_main(partial(mark_diverged, folder, sequence, str(error)))
            diverged += 1
        on_main(lambda: write_results(recipe, tasks, folder))
    return SequencesSummary(len(sequences), finished, diverged, signal)


def _measure_backbone(
    recipe: SequenceRecipe,
    tasks: Sequences[Task],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    opened: Session,
) -> int | None:
    """Measure the untouched backbone, if that is not done; the signal that interrupted it, if one did."""
    out, device = folder / "before.json", opened.arguments.device
    if on_main(out.is_file):
        return None
    logger.info("measuring the untouched backbone")
    model = load_model(recipe.backbone).requires_grad_(False)
    to_device(model, device)
    signals = Signals()
    try:
        with signals.watched(), asking(model, signals.stop_if_asked, device):
            measure(model, tokenizer, recipe, tasks, folder, out)
            signals.stop_if_asked(device)  # after the last forward, before the first task
    except StopRequested as request:
        return request.signal
    finally:
        release(model)
    return None


def _run_sequence(
    recipe: SequenceRecipe,
    sequence: Sequence,
    tasks: Sequences[Task],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> int | None:
    """Train and measure the tasks of a sequence that are not finished; the signal that interrupted it."""
    places = [stage_places(folder, sequence, number) for number in range(len(sequence.order))]
    on_main(lambda: folders.open_sequence(sequence, folder))
    if on_main(diverged_mark(folder, sequence).is_file):
        raise Diverged("has diverged before, diverged.json says how")
    for number, place in enumerate(places):
        if on_main(place.finished):
            continue
        task = sequence.order[number]
        logger.info("%s: task %d of %d, %s", sequence.label, number + 1, len(places), task)

        def measured(trainer: Trainer, number: int = number, task: str = task) -> None:
            carry_on(recipe, sequence, number, folder, trainer)
            out = places[number].scores
            measure(trainer.model, tokenizer, recipe, tasks, folder, out, learnt=task)

        stage = Stage(
            start=places[number - 1].run if number else None,
            strategy=make_strategy(recipe, sequence, number, folder, tokenizer),
            earlier=earlier_examples(recipe, sequence, number, folder, tokenizer),
            calibration=shared_calibration(folder, sequence, number),
            measure=measured,
        )
        begun = on_main(partial(runs.describe, place.run)) is not None
        summary = train(stage_recipe(recipe, sequence, number, folder), resume=begun, stage=stage)
        if summary.signal is not None:
            return summary.signal
        on_main(partial(_tidy, places[:number]))
        on_main(lambda: write_results(recipe, tasks, folder))
    on_main(partial(_tidy, places))
    return None


def _tidy(places: Sequences[StagePlaces]) -> None:
    """Delete checkpoints that no later task begins with: adapters stay."""
    for place in places:
        if (checkpoints := place.run / "checkpoints").is_dir():
            remove_folder(checkpoints)

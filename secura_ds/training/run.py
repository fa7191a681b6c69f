"""A whole training run: from a recipe to a folder with an adapter that loads."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback
from transformers.integrations import TensorBoardCallback

from secura_ds import environment
from secura_ds.backbones import load_tokenizer
from secura_ds.calibration import Calibration
from secura_ds.data import DataReport, Datasets, build_datasets
from secura_ds.environment import is_main_process
from secura_ds.errors import Diverged, UserError
from secura_ds.files import atomic_write_json
from secura_ds.ranks import from_all, on_main
from secura_ds.recipe import CabrSettings, CordaAdapter, Recipe
from secura_ds.sharding import full_shape
from secura_ds.training import checkpoint as files
from secura_ds.training import folder as folders
from secura_ds.training import preflight
from secura_ds.training import state as states
from secura_ds.training.callbacks import (
    PATIENCE,
    Agreement,
    Folding,
    Log,
    Signals,
    StopRequested,
    asking,
    cut_log,
    peak_memory,
    reset_peak_memory,
)
from secura_ds.training.export import require_exportable, require_names
from secura_ds.training.memory import check_memory
from secura_ds.training.model import (
    build_model,
    describe_adapter,
    frozen_factors,
    secura_config,
    trainable,
)
from secura_ds.training.release import release
from secura_ds.training.result import finish
from secura_ds.training.session import Session, session
from secura_ds.training.shared import SharedCalibration
from secura_ds.training.strategy import Steps, Strategy
from secura_ds.training.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSummary:
    """What `run.json` says of a run.

    `seconds` are all that led to the adapter: those before an interruption, too, and those of a calibration
    that another run has done for this one, but none of a sequence's measuring. `peak_memory_bytes` is the
    fullest rank's, up to the last step, in this process; `tokens` are all ranks'.
    """

    status: str
    """`finished`, `interrupted` (by a signal, with a checkpoint) or `stopped` (the loss was not finite)."""
    steps: int
    seconds: float
    peak_memory_bytes: int
    trainable_parameters: int
    tokens: int
    signal: int | None = None
    """The signal that interrupted the run."""
    merged: str | None = None
    """The whole checkpoint: merged, where the recipe asks for one, or the result of full training."""
    planned_memory_bytes: int | None = None
    """What the plan said before the run; None without a memory check."""


@dataclass(frozen=True)
class Stage:
    """What makes a run one of a sequence of runs."""

    start: Path | None = None
    """Output folder of the run before: this one begins with the parameters of its last checkpoint."""
    strategy: Strategy = field(default_factory=Strategy)
    """What continual learning adds to training."""
    earlier: Dataset | None = None
    """Examples of the tasks before, that calibration is to keep clear of."""
    calibration: SharedCalibration | None = None
    """What calibration wrote and chose for the same task before; kept there for the next run of it."""
    measure: Callable[[Trainer], None] | None = None
    """Called on all ranks once the adapter is written, with the model in memory; the same again on resume."""


def train(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, stage: Stage | None = None
) -> RunSummary:
    """Train what the recipe describes; every rank of a launched run calls this.

    Args:
        resume: go on from the newest whole checkpoint in the output folder; from the start if there is none.
        overwrite: delete the run that the output folder holds.
        stage: the run's part in a sequence.

    Raises:
        UserError: anything the user can mend, the same on every rank; earlier checkpoints stay as they are.
    """
    began = time.perf_counter()
    reset_peak_memory()
    folder = Path(recipe.training.output_dir).absolute()
    with session(recipe, folder) as opened:
        return _train(recipe, folder, opened, began, stage or Stage(), resume=resume, overwrite=overwrite)


def _train(
    recipe: Recipe,
    folder: Path,
    opened: Session,
    began: float,
    stage: Stage,
    *,
    resume: bool,
    overwrite: bool,
) -> RunSummary:
    """`train`, once the ranks are connected."""
    on_main(lambda: folders.check(folder, resume=resume, overwrite=overwrite, reads=_reads(recipe)))
    base = None
    if recipe.training.save_merged:
        base = on_main(lambda: require_exportable(recipe, folder, resume=resume, overwrite=overwrite))
    # The data first: what is wrong with it shows before minutes go into loading and calibrating.
    data = build_datasets(recipe, load_tokenizer(recipe.backbone))
    preflight.check_examples(len(data.train), recipe)
    found = on_main(lambda: _find_checkpoint(recipe, folder, data.report)) if resume else None
    planned = check_memory(recipe, data.train, opened.settings, calibrates=_calibrates(recipe, found, stage))
    trainer, spared = _make_trainer(recipe, folder, opened, data, found, base, stage, overwrite=overwrite)
    trainer.began = began - spared
    signals = Signals()
    agreement = _add_callbacks(trainer, recipe, folder, signals)
    with signals.watched(), _released_if_diverged(trainer):
        _run(trainer, found)
        peak = max(from_all(peak_memory()))
        merged = None
        if _status(agreement) == "finished":
            stage.strategy.finish(trainer)
            merged = finish(trainer, folder, base, agreement)
        seconds = trainer.run_seconds
        if _status(agreement) == "finished":
            _measure(trainer, stage, agreement)
        summary = RunSummary(
            status=_status(agreement),
            steps=trainer.state.global_step,
            seconds=seconds,
            peak_memory_bytes=peak,
            planned_memory_bytes=planned.needed_bytes if planned is not None else None,
            trainable_parameters=_count(trainer.model),
            tokens=int(trainer.total_tokens),
            signal=agreement.stopped_by,
            merged=merged,
        )
        on_main(lambda: atomic_write_json(folder / "run.json", asdict(summary)))
    release(trainer.model, trainer.optimizer)
    if summary.status == "stopped":
        raise Diverged(on_main(lambda: _not_finite(trainer, recipe, agreement.not_finite)))
    return summary


@contextmanager
def _released_if_diverged(trainer: Trainer) -> Iterator[None]:
    """Let go of the model where a sequence goes on after this run, with another model."""
    try:
        yield
    except Diverged:
        release(trainer.model, trainer.optimizer)
        raise


def _resolved(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The recipe as it is written down, with the folder that it was run in."""
    settings = recipe.resolved()
    return settings | {"training": settings["training"] | {"output_dir": str(folder)}}


def _reads(recipe: Recipe) -> list[Path]:
    """What the recipe may take from an earlier run: its text for calibration, its merged checkpoint."""
    adapter = recipe.adapter
    text = adapter.calibration.text if isinstance(adapter, CabrSettings | CordaAdapter) else None
    found = [] if text is None else [recipe.resolve_path(text)]
    backbone = Path(recipe.backbone.model)
    return [*found, backbone] if backbone.is_dir() else found


def _find_checkpoint(recipe: Recipe, folder: Path, data: DataReport) -> Path | None:
    """The checkpoint to go on from; None if the folder has none."""
    found = files.latest(folder / "checkpoints")
    if found is not None:
        folders.check_same_run(folder / "recipe.resolved.json", _resolved(recipe, folder))
        folders.check_same_data(folder / "data.json", data)
        logger.info("going on from %s", found)
    else:
        logger.info("no checkpoint in %s: starting from the beginning", folder)
    return found


def _open_folder(
    recipe: Recipe,
    folder: Path,
    data: DataReport,
    found: Path | None,
    calibrations: Sequence[tuple[Calibration, float]],
    *,
    overwrite: bool,
) -> None:
    """Claim the output folder, and write down what is run, on what, and the text it was calibrated on."""
    folders.claim(folder, overwrite=overwrite)
    step = files.step_of(found) if found is not None else 0
    files.set_aside_after(folder / "checkpoints", step)
    for name in ("metrics.jsonl", "statistics.jsonl"):
        cut_log(folder / name, step)
    atomic_write_json(folder / "recipe.resolved.json", _resolved(recipe, folder))
    atomic_write_json(folder / "data.json", data.to_dict())
    about = {**environment.describe_environment(), "seed": recipe.training.seed}
    atomic_write_json(folder / "environment.json", about)
    for calibration, _ in calibrations:
        calibration.save(folder / "calibration.jsonl")


def _make_trainer(
    recipe: Recipe,
    folder: Path,
    opened: Session,
    data: Datasets,
    found: Path | None,
    base: Path | None,
    stage: Stage,
    *,
    overwrite: bool,
) -> tuple[Trainer, float]:
    """Build the model, open the folder and put both into a Trainer that goes on from `found`.

    Returns:
        The trainer, and the seconds of a calibration that another run has done for this one.
    """
    checkpoints = folder / "checkpoints"
    resumed = (found, files.read(found)) if found is not None else None
    goes_on = found is None and not _chooses(recipe, found, stage)
    start = on_main(lambda: _last_of(stage.start)) if goes_on else None
    earlier = found or start
    expected = files.factors_of(earlier) if earlier is not None else None
    kept_in = earlier.parent if earlier is not None else checkpoints
    whole = on_main(lambda: _factors_are_whole(kept_in, expected))
    calibrations: list[tuple[Calibration, float]] = []
    model, tokenizer = build_model(
        recipe,
        device=opened.arguments.device,
        sharded=opened.settings is not None,
        on_calibration=lambda *made: calibrations.append(made),
        factors=files.read_factors(kept_in, expected) if earlier is not None and whole else None,
        examples=data.train,
        earlier=stage.earlier,
        shared=stage.calibration,
    )
    logger.info("%s", describe_adapter(model, recipe))
    if not whole and expected is not None:
        on_main(lambda: files.mend_factors(kept_in, frozen_factors(model), expected))
    if base is not None:
        on_main(lambda: require_names(model, base))
    # Only now is an earlier run deleted: what the recipe asks for fits the backbone.
    on_main(lambda: _open_folder(recipe, folder, data.report, found, calibrations, overwrite=overwrite))
    spared = sum(seconds for _, seconds in calibrations)
    calibrations.clear()  # the factors are in the model
    trainer = Trainer(
        model,
        opened.arguments,
        tokenizer,
        data.train,
        data.validation,
        checkpoints=checkpoints,
        keep=recipe.training.save_total_limit,
        reentrant=preflight.reentrant_checkpointing(opened.settings),
        resumed=resumed,
        start=_beginning(stage, start),
        strategy=stage.strategy,
    )
    if resumed is None:
        trainer.factors = on_main(lambda: files.write_factors(checkpoints, frozen_factors(model)))
    else:
        state = resumed[1].state
        states.check_batch(state, trainer.batch_over_all_ranks, recipe.training.micro_batch_size)
        trainer.factors = expected
    return trainer, spared


def _chooses(recipe: Recipe, found: Path | None, stage: Stage) -> bool:
    """Whether a run has factors of its own to choose."""
    renews = isinstance(recipe.adapter, CabrSettings) and recipe.adapter.renews
    return found is None and (stage.start is None or renews)


def _calibrates(recipe: Recipe, found: Path | None, stage: Stage) -> bool:
    shared = stage.calibration
    return _chooses(recipe, found, stage) and not (shared is not None and shared.exists())


def _beginning(stage: Stage, start: Path | None) -> Callable[[nn.Module], None] | None:
    """What a run takes over from the run before: its last checkpoint, or the weights it has changed."""
    if start is not None:
        return lambda model: states.restore_weights(model, files.read(start), files.read_folded(start))
    if stage.start is not None:
        adapter = stage.start / "adapter"
        return lambda model: states.begin_with_weights(model, adapter)
    return None


def _last_of(folder: Path | None) -> Path | None:
    """The last checkpoint of the run before in a sequence."""
    if folder is None:
        return None
    found = files.latest(folder / "checkpoints")
    if found is None:
        raise UserError(
            f"{folder} has no whole checkpoint to go on from: delete the folder of its sequence, to train it "
            "again"
        )
    return found


def _factors_are_whole(checkpoints: Path, expected: files.Fingerprint | None) -> bool:
    if files.has_factors(checkpoints, expected):
        return True
    logger.warning("%s is missing or damaged: choosing its contents anew", checkpoints / files.FACTORS)
    return False


def _add_callbacks(trainer: Trainer, recipe: Recipe, folder: Path, signals: Signals) -> Agreement:
    trainer.remove_callback(PrinterCallback)
    agreement = Agreement(trainer, signals)
    trainer.add_callback(agreement)
    trainer.add_callback(Steps(trainer.strategy))
    config = secura_config(trainer.model)
    if config is not None:
        trainer.add_callback(Folding(folder, config.fold_every))
    if is_main_process():
        trainer.add_callback(Log(trainer, folder))
        if "tensorboard" in recipe.training.report_to:
            trainer.add_callback(TensorBoardCallback(SummaryWriter(log_dir=str(folder / "logs"))))
    return agreement


def _run(trainer: Trainer, found: Path | None) -> None:
    """Train to the end or to the step at which a signal arrived."""
    try:
        trainer.train(resume_from_checkpoint=str(found) if found is not None else None)
    except StopRequested:
        trainer._save_checkpoint()
    except Exception as error:
        if "loss scale already at minimum" in str(error):  # DeepSpeed's own end of a float16 run
            raise Diverged(
                f"gradients overflowed float16 up to step {trainer.state.global_step}, whatever their scale: "
                'try a lower training.learning_rate, or backbone.dtype "bfloat16"'
            ) from error
        raise
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Log):
                callback.close()


def _status(agreement: Agreement) -> str:
    if agreement.not_finite and (agreement.stopped_by is None or agreement.not_finite >= PATIENCE):
        return "stopped"
    return "interrupted" if agreement.stopped_by is not None else "finished"


def _measure(trainer: Trainer, stage: Stage, agreement: Agreement) -> None:
    """Have the sequence measure the model; a signal ends that within a forward pass."""
    if stage.measure is not None:
        with suppress(StopRequested), asking(trainer.model, agreement.stop_if_asked, trainer.args.device):
            stage.measure(trainer)
            agreement.stop_if_asked(trainer.args.device)  # after the last forward, before the next task


def _count(model: nn.Module) -> int:
    return sum(full_shape(p).numel() for p in trainable(model).values())


def _not_finite(trainer: Trainer, recipe: Recipe, steps: int) -> str:
    kept = files.latest(trainer.checkpoints)
    last = f"the last good checkpoint is {kept}" if kept is not None else "there was no checkpoint yet"
    return (
        f"the loss was not finite for {steps} steps, up to step {trainer.state.global_step}: "
        f"try a lower training.learning_rate (it is {recipe.training.learning_rate:g}) or a longer "
        f"warmup_ratio; {last}"
    )

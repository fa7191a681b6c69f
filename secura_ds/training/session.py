"""What every run needs around it: a machine that fits, connected ranks, and an eye on the other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from trl import SFTConfig

from secura_ds.recipe import Recipe
from secura_ds.training import preflight
from secura_ds.training.arguments import make_arguments
from secura_ds.training.meeting import connect
from secura_ds.training.watch import watching


class Session(NamedTuple):
    """The Trainer's arguments, which must stay alive while models load, and DeepSpeed's configuration."""

    arguments: SFTConfig
    settings: dict[str, Any] | None


@contextmanager
def session(recipe: Recipe, folder: Path) -> Iterator[Session]:
    """Inside the block the ranks are connected, and a rank that fails is named by the others.

    Args:
        folder: the run's folder.

    Raises:
        UserError: the recipe does not fit this machine or its launcher; a rank does not answer.
    """
    preflight.check_machine(recipe)
    settings = preflight.deepspeed_settings(recipe)
    if settings is not None:
        connect()
    arguments = make_arguments(recipe, folder, settings)
    with watching():
        preflight.limit_threads()
        yield Session(arguments, settings)

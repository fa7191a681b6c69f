"""What a training command writes to the terminal: our own lines, and of the libraries only what is wrong."""

from __future__ import annotations

import logging
import sys
import warnings

import transformers

from secura_ds.environment import is_main_process


def set_up_console() -> None:
    """Our own lines on the main process; of the libraries only what is wrong."""
    level = logging.INFO if is_main_process() else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("secura_ds").setLevel(level)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # transformers accumulates gradients itself and tells accelerate 1, whatever DeepSpeed is told.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    # Libraries tell each other what will change; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not is_main_process():
        transformers.utils.logging.disable_progress_bar()

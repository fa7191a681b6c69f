"""What a run leaves when it ends: its adapter, read back, or the whole model."""

from __future__ import annotations

import logging
from contextlib import nullcontext, suppress
from pathlib import Path

from peft import PeftModel
from safetensors import safe_open

from secura_ds.adapter import fold, save_adapter
from secura_ds.environment import is_main_process
from secura_ds.errors import UserError
from secura_ds.files import atomic_folder
from secura_ds.ranks import on_main
from secura_ds.training import folder as folders
from secura_ds.training.callbacks import Agreement, StopRequested
from secura_ds.training.export import export
from secura_ds.training.model import secura_config, trainable
from secura_ds.training.trainer import Trainer
from secura_ds.training.whole import save_whole

logger = logging.getLogger(__name__)


def finish(trainer: Trainer, folder: Path, base: Path | None, agreement: Agreement) -> str | None:
    """Write the adapter and its tokenizer, read them back, and merge them into `base`, if there is one.

    Full training has no adapter: the model itself is written.

    Returns:
        The folder of the whole checkpoint, if there is to be one and no signal came before its end.
    """
    if not isinstance(trainer.model, PeftModel):
        target = folder / folders.MODEL
        return str(save_whole(trainer.model, trainer.processing_class, trainer.args, target))
    model = trainer.model
    config = secura_config(model)
    if config is not None and config.strategy == "M1":
        # What is written is then the weight that every later use of the adapter sees.
        fold(model)
    target = folder / "adapter"
    with atomic_folder(target, overwrite=True) if is_main_process() else nullcontext(target) as place:
        save_adapter(model, place)
        if is_main_process():
            trainer.processing_class.save_pretrained(place)
    on_main(lambda: _check_adapter(target, len(trainable(model))))
    logger.info("saved %s", target)
    if base is not None:
        with suppress(StopRequested):
            return export(model, trainer.args, base, folder, agreement).out
    return None


def _check_adapter(folder: Path, trained: int) -> None:
    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    empty = [key for key, shape in shapes.items() if 0 in shape]
    if empty or len(shapes) < trained:
        raise UserError(
            f"{folder} holds {len(shapes)} tensors, {len(empty)} of them empty, for {trained} trained "
            "parameters: the adapter was not saved whole"
        )

"""The whole checkpoint that full training leaves, also where ZeRO-3 holds the weights in slices."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from secura_ds import sharding
from secura_ds.environment import is_main_process
from secura_ds.files import atomic_folder
from secura_ds.merge import check_strict_load
from secura_ds.ranks import on_main
from secura_ds.training.export import loading_whole


def save_whole(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: SFTConfig, folder: Path
) -> Path:
    """Write `model` and its tokenizer as a Hugging Face checkpoint of safetensors; returns its folder.

    Every rank calls it. Weights are gathered one at a time, into the main process's memory, which for the
    moment holds the model once.

    Raises:
        UserError: the disk is full, or what was written does not load strictly.
    """
    keep = is_main_process()
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = sharding.whole(parameter, keep=keep)
        if keep:
            state[name] = value

    def write() -> None:
        with atomic_folder(folder, overwrite=True) as place, loading_whole(arguments):
            model.save_pretrained(place, state_dict=state)
            tokenizer.save_pretrained(place)
            check_strict_load(place)

    on_main(write)
    return folder

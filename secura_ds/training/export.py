"""The merged checkpoint at the end of a run, from the model in training, one weight at a time.

The main rank merges as `launch/merge.py` does, from the base's files and the adapter that was just saved. For
every weight that training adapted or holds in 4 bits it asks all ranks to gather what the model holds, and
copies only that to its own memory; the other ranks do what it asks until it says that it has ended, well or
not. So peak memory is one whole weight on each rank, and one more on the main rank.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from trl import SFTConfig

from secura_ds import sharding
from secura_ds.adapter.corda import starts_of
from secura_ds.backbones import resolve_base
from secura_ds.checkpoint_files import DTYPES, StoredTensor, open_checkpoint
from secura_ds.environment import is_main_process
from secura_ds.errors import UserError
from secura_ds.files import atomic_write_json
from secura_ds.merge import MergeReport, merge, require_plain
from secura_ds.ranks import on_main
from secura_ds.recipe import Recipe
from secura_ds.training.callbacks import Agreement, StopRequested
from secura_ds.training.folder import MERGED

_ENDED = -1


def require_exportable(recipe: Recipe, folder: Path, *, resume: bool, overwrite: bool) -> Path:
    """The folder of the base, into which the run's result can be merged. Main process only.

    Raises:
        UserError: the base has no safetensors or is itself quantized, what would be overwritten is no run's
            result, or the disk has no room for the merged weights.
    """
    out = folder / MERGED
    try:
        base = resolve_base(recipe.backbone.model, recipe.backbone.revision).resolve()
        checkpoint = open_checkpoint(base)
        require_plain(checkpoint)
    except UserError as error:
        raise UserError(f"training.save_merged is true, but {error}; or set it to false") from error
    if base == out or out in base.parents:
        raise UserError(
            f"training.save_merged would overwrite the backbone {base}: choose another output_dir"
        )
    if out.exists() and not (resume or overwrite):
        raise UserError(f"training.save_merged is true, but {out} already exists: move it elsewhere")
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    # `--resume` keeps an earlier result until the new one stands; `--overwrite` deletes it first.
    reused = _size(out.with_name(f"{MERGED}.partial")) + (_size(out) if overwrite else 0)
    room = shutil.disk_usage(existing).free + reused
    if room < checkpoint.num_bytes:
        raise UserError(
            f"training.save_merged needs {checkpoint.num_bytes / 1e9:.2f} GB, but the disk holding {folder} "
            f"has {room / 1e9:.2f} GB free: free some space, choose another output_dir, or set it to false"
        )
    return base


def require_names(model: PeftModel, base: Path) -> None:
    """The checkpoint stores every weight that training changes, under the name it has in the model.

    Raises:
        UserError: names the first weight that it does not store.
    """
    stored = open_checkpoint(base).tensors
    for name in _changed_weights(model):
        if name not in stored:
            raise UserError(
                f"training.save_merged is true, but {base} does not store {name}: save the model with "
                "transformers' save_pretrained and train on that, or set it to false"
            )


def export(
    model: PeftModel, arguments: SFTConfig, base: Path, folder: Path, agreement: Agreement
) -> MergeReport:
    """Write `folder/merged` and the run's `merge.json`; collective, after the adapter was saved.

    An interrupted export leaves `merged.partial`, from which the next one goes on. The merged model is
    compared with the adapter on its base afterwards by the main rank alone, both loaded from disk: a figure
    of the files that were written, equal to the offline merge's, and only where memory is left beside the
    model in training.

    Raises:
        UserError: the disk is full, or a weight is not finite; on every rank.
        StopRequested: a signal asked for the end; on every rank.
    """
    weights = _LiveWeights(model, lambda: agreement.stop_if_asked(arguments.device))
    report: MergeReport | None = None
    failure: Exception | None = None
    if is_main_process():
        try:
            with loading_whole(arguments):
                adapter, out = folder / "adapter", folder / MERGED
                report = merge(base, adapter, out, overwrite=True, live=weights.read)
            atomic_write_json(folder / "merge.json", asdict(report))
        except StopRequested:
            raise  # as on every other rank
        except Exception as error:
            failure = error
        weights.end()
    else:
        weights.follow()

    def outcome() -> MergeReport:
        if failure is not None:
            raise failure
        assert report is not None
        return report

    return on_main(outcome)


class _LiveWeights:
    """Weights of the model in training, gathered when the main rank asks for them.

    Args:
        stop_if_asked: called on all ranks before each weight; may raise.
    """

    def __init__(self, model: PeftModel, stop_if_asked: Callable[[], None]) -> None:
        self._modules = _changed_weights(model)
        self._order = list(self._modules)
        self._split = bool(starts_of(model))
        self._folded = bool(getattr(model.peft_config["default"], "folded", False))
        self._stop_if_asked = stop_if_asked

    def read(self, stored: StoredTensor) -> Tensor:
        """On the main rank: what the model holds of one tensor of the checkpoint, in the stored dtype."""
        if not self._holds(stored):
            return stored.read()
        self._agree(self._order.index(stored.name))
        module = self._modules[stored.name]
        with torch.no_grad(), sharding.gathered(module.weight):
            value = sharding.dequantized(module)
            return value.to("cpu", DTYPES[stored.dtype], copy=not sharding.is_quantized(module))

    def follow(self) -> None:
        """On every other rank: take part in gathering until the main rank has ended."""
        while (index := self._agree()) != _ENDED:
            with sharding.gathered(self._modules[self._order[index]].weight):
                pass

    def end(self) -> None:
        """On the main rank: nothing more will be read."""
        self._agree(_ENDED)

    def _agree(self, index: int = _ENDED) -> int:
        """The main rank's next weight, on every rank."""
        agreed = on_main(lambda: index)
        if agreed != _ENDED:
            self._stop_if_asked()
        return agreed

    def _holds(self, stored: StoredTensor) -> bool:
        """False for a tensor that training replaces, or held only a rounded copy of and did not change.

        And where CorDA has taken a part out of it, as its adapter is saved for the whole.
        """
        module = self._modules.get(stored.name)
        if module is None or stored.dtype not in DTYPES or self._split:
            return False
        exact = torch.promote_types(module.weight.dtype, DTYPES[stored.dtype]) == module.weight.dtype
        return exact or self._folded or sharding.is_quantized(module)


def _changed_weights(model: PeftModel) -> dict[str, nn.Module]:
    """The linear layers that are adapted or in 4 bits, by the name of their weight in the checkpoint."""
    found: dict[str, nn.Module] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            found[f"{name}.weight"] = module.get_base_layer()
        elif sharding.is_quantized(module) and not name.endswith(".base_layer"):
            found[f"{name}.weight"] = module
    return found


@contextmanager
def loading_whole(arguments: SFTConfig) -> Iterator[None]:
    """Models loaded in the block are whole, although the run's DeepSpeed configuration is alive."""
    settings = getattr(arguments, "hf_deepspeed_config", None)  # only there with DeepSpeed
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if settings is not None:
            set_hf_deepspeed_config(settings)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

"""The merge from end to end: do the inputs belong together, write shard by shard, check the output."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from secura_ds.checkpoint_files import Checkpoint, open_checkpoint
from secura_ds.errors import UserError
from secura_ds.files import atomic_write_json, explained, swap_folder
from secura_ds.merge.adapter_file import AdapterFile, open_adapter
from secura_ds.merge.check import LogitGap, check_strict_load, logit_gap
from secura_ds.merge.edits import Edit, plan_edits
from secura_ds.merge.work import (
    Part,
    Read,
    WorkFolder,
    begin_shard,
    end_shard,
    only_merge_into,
    reader,
    split,
    write_part,
)
from secura_ds.merge.workers import share
from secura_ds.peak_memory import PeakMemory
from secura_ds.reading import read_json_object

logger = logging.getLogger(__name__)

Onto = Literal["trained", "original"]

REPORT_NAME = "merge.json"


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; written to `merge.json` in the merged folder.

    Attributes:
        trained_in_4_bits: the adapter was trained on quantized weights, so that `onto` makes a difference.
        seconds: wall time, the check included.
        bytes: size of the merged weights.
        resumed_bytes: how many of them an earlier, interrupted run had finished.
        adapted_tensors: tensors the adapter changed or replaced.
        dequantized_tensors: tensors that only took the values 4-bit training saw.
        untouched_tensors: tensors copied byte for byte.
        workers: processes that wrote shards.
        peak_memory_bytes: growth of memory while merging, the check excluded; of several workers the largest.
        peak_memory_sum_bytes: the growth of all workers added up.
        max_logit_gap: largest difference of a logit between adapter model, on the weights it was trained on,
            and merged model.
        kl: mean KL(adapter model || merged model) per token, in nats.
        check_skipped: why these two are None, else None.
    """

    base: str
    adapter: str
    out: str
    onto: str
    trained_in_4_bits: bool
    seconds: float
    bytes: int
    resumed_bytes: int
    adapted_tensors: int
    dequantized_tensors: int
    untouched_tensors: int
    workers: int
    peak_memory_bytes: int
    peak_memory_sum_bytes: int
    max_logit_gap: float | None
    kl: float | None
    check_skipped: str | None


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    onto: Onto = "trained",
    check: bool = True,
    overwrite: bool = False,
    progress: bool = True,
    workers: int = 1,
    live: Read | None = None,
) -> MergeReport:
    """Merge `adapter` into the checkpoint `base` and write a plain Hugging Face checkpoint to `out`.

    Works in `out.partial`: an interrupted merge leaves nothing named `out`, and the same call again goes on
    after the last finished shard. Keys, dtypes, shapes, tied weights and configuration are the base's.

    Args:
        base: folder of a safetensors checkpoint.
        adapter: folder of a SECURA, LoRA or DoRA adapter.
        out: the folder to make.
        onto: what a 4-bit trained adapter is added to: "trained", the dequantized weights training saw (which
            then replace the unadapted quantized weights too), or "original", the base's own. A LoRA or DoRA
            saved by PEFT, not `save_adapter`, does not tell how it was trained: it goes onto the base's own.
        check: load strictly from headers, and measure the gap of the logits where memory allows.
        overwrite: replace `out` if it exists.
        progress: show a bar.
        workers: processes that share the work, a quarter of a gigabyte at a time; where there are fewer such
            parts, only so many. A script that asks for several needs the usual `if __name__ == "__main__"`.
        live: gives a weight as the model in training holds it, dequantized and with M1's folds, in the dtype
            it is stored in; `adapter` is then what that model has just saved. Called in the order of files.

    Raises:
        UserError: inputs are damaged or do not belong together, `out` exists or another merge works on it, a
            worker died, or the disk is full.
    """
    if workers < 1:
        raise UserError(f"workers is {workers}: at least 1")
    assert live is None or (workers == 1 and onto == "trained"), "only this process has the model"
    started = time.monotonic()
    base, adapter, out = Path(base).resolve(), Path(adapter).resolve(), Path(out).resolve()
    _require_free(base, adapter, out, overwrite)
    checkpoint, adapter_file = open_checkpoint(base), open_adapter(adapter)
    _require_tied(checkpoint, adapter_file, require_plain(checkpoint))
    edits = plan_edits(checkpoint, adapter_file, "live" if live else onto)
    if check:
        check_strict_load(base)
    inputs = {
        "onto": onto,
        "base": {file.path.name: file.fingerprint() for file in checkpoint.files},
        "adapter": adapter_file.fingerprint(),
    }
    with explained(out), only_merge_into(out):
        _require_free(base, adapter, out, overwrite)  # it may have become another merge's meanwhile
        with WorkFolder(out.with_name(f"{out.name}.partial"), inputs) as work:
            resumed, growth = _write_shards(work, checkpoint, edits, workers, live, progress)
            work.copy_side_files(checkpoint, adapter_file)
            work.verify(checkpoint)
            gap = (
                logit_gap(checkpoint, adapter_file, work.path) if check else LogitGap(skipped="not asked for")
            )
            report = MergeReport(
                base=str(base),
                adapter=str(adapter),
                out=str(out),
                onto=onto,
                trained_in_4_bits=adapter_file.quantization is not None,
                seconds=time.monotonic() - started,
                bytes=checkpoint.num_bytes,
                resumed_bytes=resumed,
                adapted_tensors=adapter_file.num_adapted,
                dequantized_tensors=len(edits) - adapter_file.num_adapted,
                untouched_tensors=len(checkpoint.tensors) - len(edits),
                workers=len(growth),
                peak_memory_bytes=max(growth),
                peak_memory_sum_bytes=sum(growth),
                max_logit_gap=gap.max_logit_gap,
                kl=gap.kl,
                check_skipped=gap.skipped,
            )
            atomic_write_json(work.path / REPORT_NAME, asdict(report))
            work.forget()
            swap_folder(work.path, out)
    return report


def _write_shards(
    work: WorkFolder,
    base: Checkpoint,
    edits: Mapping[str, Edit],
    workers: int,
    live: Read | None,
    progress: bool,
) -> tuple[int, list[int]]:
    """Write what is not finished yet; returns the bytes that were, and each process's growth of memory."""
    left = [file for file in base.files if not work.has(file)]
    missing = sum(file.size for file in left)
    free = shutil.disk_usage(work.path).free
    if missing > free:
        raise UserError(
            f"the merged weights need {missing / 1e9:.2f} GB more, but the disk holding {work.path} has "
            f"{free / 1e9:.2f} GB free: free some space or choose another folder"
        )
    parts = [part for file in left for part in split(file)]
    if 0 < len(parts) < workers:
        logger.warning("%d of %d workers are used: there is no more to share out", len(parts), workers)
        workers = len(parts)
    total, resumed = base.num_bytes, base.num_bytes - missing
    with tqdm(
        total=total, initial=resumed, unit="B", unit_scale=True, desc="merge", disable=not progress
    ) as bar:
        if workers > 1 and parts:
            return resumed, share(work, parts, edits, workers, bar.update)
        memory, read = PeakMemory(), live or reader()
        for file in left:
            begin_shard(work.path, file)
            bar.update(len(file.header))
            write_part(work.path, Part(file, file.tensors), edits, read, bar.update)
            end_shard(work.path, file)
            work.note(file.path.name)
        return resumed, [memory.growth()]


def _require_free(base: Path, adapter: Path, out: Path, overwrite: bool) -> None:
    for name, folder in (("base", base), ("adapter", adapter)):
        if out == folder or out in folder.parents:
            raise UserError(f"out is {out}, which is or holds the {name} {folder}: choose another folder")
    if out.exists() and not overwrite:
        raise UserError(f"{out} already exists: choose another folder, or add --overwrite")
    if out.exists() and not _is_checkpoint(out):
        raise UserError(
            f"{out} is no checkpoint, and --overwrite replaces nothing else: choose another folder"
        )


def _is_checkpoint(out: Path) -> bool:
    """Whether a folder is empty or holds what a merge writes: its user may have meant another one."""
    if not out.is_dir():
        return False
    whole = (out / "config.json").is_file() and any(out.glob("*.safetensors"))
    return whole or not any(out.iterdir())


def require_plain(base: Checkpoint) -> dict[str, Any]:
    """The base's configuration, if its weights are not themselves quantized.

    Raises:
        UserError: they are, or config.json cannot be read.
    """
    config = read_json_object(base.folder / "config.json", remedy="copy the checkpoint again")
    if "quantization_config" in config:
        raise UserError(f"{base.folder} is itself quantized: give the 16-bit checkpoint it was made from")
    return config


def _require_tied(base: Checkpoint, adapter: AdapterFile, config: Mapping[str, Any]) -> None:
    """No embedding is replaced without the head tied to it."""
    tied = "lm_head.weight" not in base.tensors and not adapter.config.get("ensure_weight_tying")
    for name, stored in adapter.replacements.items():
        if tied and len(stored.shape) == 2 and stored.shape[0] == config.get("vocab_size"):
            raise UserError(
                f"{adapter.folder} replaces {name}, to which the base ties its head, but training kept "
                "them apart: a merge would change the model; train with ensure_weight_tying"
            )

"""The folder a merge works in: `OUT.partial`, with finished shards and a note of what they came from.

Every output shard has its base shard's header, so it is written front to back: untouched tensors are copied
as bytes, touched ones are read, edited and written. Several processes may write parts of one shard, but one
alone, the one that holds the folder's lock, begins and ends shards and writes the note.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import RawIOBase
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from secura_ds.checkpoint_files import INDEX_NAME, Checkpoint, StoredTensor, TensorFile, open_tensor_file
from secura_ds.errors import UserError
from secura_ds.files import atomic_write_json, remove_left_overs
from secura_ds.merge.adapter_file import AdapterFile
from secura_ds.merge.edits import Edit
from secura_ds.method.cabr import row_blocks
from secura_ds.reused_memory import ReusedMemory

logger = logging.getLogger(__name__)

Advance = Callable[[int], Any]
"""Is told the bytes of the merged weights as they are written."""
Read = Callable[[StoredTensor], Tensor]
"""Gives a tensor that is to be edited, in memory that may be overwritten and is valid until the next call."""

STATE_NAME = "merge.state.json"
_TORN = ".writing"
_CHUNK_BYTES = 2**20  # stays in a processor's cache between reading and writing
PART_BYTES = 2**28
# Weights in other formats, and pickles of any kind: neither belongs to what was merged.
_NOT_COPIED_SUFFIXES = {
    ".safetensors", ".gguf", ".h5", ".msgpack", ".ot", ".onnx", ".bin", ".pt", ".pth", ".pkl", ".pickle",
    ".ckpt",
}  # fmt: skip
_NOT_COPIED = {"README.md", "merge.json", INDEX_NAME, STATE_NAME}
_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "*.jinja", "additional_chat_templates",
)  # fmt: skip


class WorkFolder:
    """`OUT.partial`, resumed where its note says that it came from the same inputs, else begun anew."""

    def __init__(self, path: Path, inputs: Mapping[str, Any]) -> None:
        """Open or begin the folder; `inputs` is JSON-able and identifies base, adapter and choices."""
        self.path = path
        self._state: dict[str, Any] = {"inputs": json.loads(json.dumps(inputs)), "done": []}
        state = path / STATE_NAME
        if _read_json(state).get("inputs") == self._state["inputs"]:
            self._state = _read_json(state)
            remove_left_overs(path)  # of a merge that was killed as it wrote: they would be published
            return
        if path.exists():
            logger.info("%s holds another merge that did not finish: beginning anew", path)
            shutil.rmtree(path)
        path.mkdir(parents=True)
        self._save()

    def _save(self) -> None:
        atomic_write_json(self.path / STATE_NAME, self._state)

    def has(self, file: TensorFile) -> bool:
        """True where the shard of this base shard was finished by an earlier run."""
        target = self.path / file.path.name
        return (
            file.path.name in self._state["done"] and target.is_file() and target.stat().st_size == file.size
        )

    def note(self, name: str) -> None:
        """Note the shard of this name as finished."""
        self._state["done"].append(name)
        self._save()

    def copy_side_files(self, base: Checkpoint, adapter: AdapterFile) -> None:
        """Index, configuration and licence of the base, and its tokenizer unless the adapter has its own."""
        for file in base.folder.iterdir():
            kept = file.suffix not in _NOT_COPIED_SUFFIXES and file.name not in _NOT_COPIED
            if file.is_file() and kept and not file.name.startswith("."):
                shutil.copyfile(file, self.path / file.name)
        if base.index is not None:
            shutil.copyfile(base.index, self.path / INDEX_NAME)
        folder = adapter.folder if (adapter.folder / "tokenizer_config.json").is_file() else base.folder
        for file in (file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
            if file.is_dir():
                shutil.copytree(file, self.path / file.name, dirs_exist_ok=True)
            elif file.suffix not in _NOT_COPIED_SUFFIXES:
                shutil.copyfile(file, self.path / file.name)

    def verify(self, base: Checkpoint) -> None:
        """Every shard is there, whole, and has its base shard's header: same keys, dtypes and shapes.

        Raises:
            UserError: a shard was changed while the merge ran.
        """
        for file in base.files:
            written = self.path / file.path.name
            if open_tensor_file(written).header != file.header:
                raise UserError(f"{written} is not what was written: remove {self.path} and merge again")

    def forget(self) -> None:
        """Remove the note: what remains is the checkpoint."""
        (self.path / STATE_NAME).unlink()

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *_: object) -> None:
        """Keep the folder, without torn shards, only where a rerun can use what it holds."""
        for torn in self.path.glob(f"*{_TORN}"):
            torn.unlink()
        if not self._state["done"]:
            shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def only_merge_into(out: Path) -> Iterator[None]:
    """Inside the block no other merge works on `out`.

    Raises:
        UserError: another one does.
    """
    path = out.with_name(f".{out.name}.partial.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"another merge into {out} is running (it holds {path}): wait for it, or choose another folder"
        ) from error
    try:
        yield
    finally:
        # While it is held: who has opened the file meanwhile finds it gone, and does not count it as locked.
        path.unlink(missing_ok=True)
        lock.release()


class Part(NamedTuple):
    """Neighbouring tensors of one base shard: what a process writes at a time."""

    file: TensorFile
    tensors: tuple[StoredTensor, ...]


def split(file: TensorFile) -> list[Part]:
    """All tensors of a base shard in parts of about `PART_BYTES`; a tensor is never cut."""
    parts: list[Part] = []
    tensors: list[StoredTensor] = []
    for tensor in file.tensors:
        tensors.append(tensor)
        if sum(t.num_bytes for t in tensors) >= PART_BYTES:
            parts.append(Part(file, tuple(tensors)))
            tensors = []
    return [*parts, Part(file, tuple(tensors))] if tensors or not parts else parts


def begin_shard(folder: Path, file: TensorFile) -> None:
    """Begin the output shard of one base shard with the header; nothing has its name before `end_shard`."""
    _torn(folder, file).write_bytes(file.header)


def reader() -> Read:
    """Reads tensors from the base's files, all into one piece of memory."""
    memory = ReusedMemory()
    return lambda tensor: tensor.read(memory.take(tensor.num_bytes, torch.uint8))


def write_part(folder: Path, part: Part, edits: Mapping[str, Edit], read: Read, advance: Advance) -> None:
    """Write a part of a shard that was begun in `folder`, to its place; other parts are left alone.

    Raises:
        UserError: an edit made a weight that is not finite, or refused its tensor.
    """
    with part.file.path.open("rb", buffering=0) as source, _torn(folder, part.file).open("rb+") as out:
        for tensor, ahead in zip_longest(part.tensors, part.tensors[1:]):
            if ahead is not None:  # the disk reads it while this one is edited
                os.posix_fadvise(source.fileno(), ahead.start, ahead.num_bytes, os.POSIX_FADV_WILLNEED)
            out.seek(tensor.start)
            if tensor.name in edits:
                _write_edited(tensor, edits[tensor.name], out, read)
                advance(tensor.num_bytes)
            else:
                _copy_range(source, out, tensor, advance)
            out.flush()
            # The disk begins with these bytes now, so that the wait at the end of the shard is short, and
            # what it has already leaves the page cache, as what was read does: both are needed only once.
            os.posix_fadvise(out.fileno(), 0, tensor.stop, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(source.fileno(), tensor.start, tensor.num_bytes, os.POSIX_FADV_DONTNEED)


def end_shard(folder: Path, file: TensorFile) -> None:
    """Give a shard whose parts are all written its name, once the disk has it."""
    torn = _torn(folder, file)
    with torn.open("rb+") as out:
        os.fsync(out.fileno())
    torn.rename(folder / file.path.name)


def _torn(folder: Path, file: TensorFile) -> Path:
    return (folder / file.path.name).with_suffix(_TORN)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty where there is none, or a torn one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _copy_range(source: RawIOBase, out: BinaryIO, tensor: StoredTensor, advance: Advance) -> None:
    source.seek(tensor.start)
    chunk = memoryview(bytearray(min(_CHUNK_BYTES, tensor.num_bytes)))
    left = tensor.num_bytes
    while left:
        count = source.readinto(chunk[:left])
        if not count:
            raise UserError(f"{tensor.file} ended inside {tensor.name}: the file is truncated, copy it again")
        out.write(chunk[:count])
        left -= count
        advance(count)


def _write_edited(tensor: StoredTensor, edit: Edit, out: BinaryIO, read: Read) -> None:
    before = read(tensor)
    dtype = before.dtype
    merged = edit(before)
    assert merged.dtype == dtype and tuple(merged.shape) == tensor.shape, tensor.name
    flat = merged.contiguous().view(-1)
    for block in row_blocks(flat.numel(), 1):
        least, most = (float(value) for value in torch.aminmax(flat[block]))
        if not (math.isfinite(least) and math.isfinite(most)):
            raise UserError(
                f"{tensor.name} is not finite after merging: the adapter or the base is broken; "
                "use an earlier checkpoint of the adapter"
            )
    out.write(memoryview(flat.view(torch.uint8).numpy()))

"""The folder a merge works in: `OUT.partial`, with finished shards and a note of what they came from.

Every output shard has its base shard's header, so it is written front to back: untouched tensors are copied
as bytes, touched ones are read, edited and written.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from secura_ds.checkpoint_files import INDEX_NAME, Checkpoint, StoredTensor, TensorFile, open_tensor_file
from secura_ds.errors import UserError
from secura_ds.files import atomic_write_json
from secura_ds.merge.adapter_file import AdapterFile
from secura_ds.merge.edits import Edit
from secura_ds.method.cabr import row_blocks

logger = logging.getLogger(__name__)

STATE_NAME = "merge.state.json"
_CHUNK_BYTES = 8 * 2**20
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ot", ".onnx"}
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

    def write_shard(self, file: TensorFile, edits: Mapping[str, Edit], advance: Callable[[int], Any]) -> None:
        """Write one output shard and note it as finished; `advance` is told the bytes as they are written.

        Raises:
            UserError: an edit made a weight that is not finite, or refused its tensor.
        """
        target = self.path / file.path.name
        writing = target.with_suffix(".writing")
        with file.path.open("rb") as source, writing.open("wb") as out:
            out.write(file.header)
            advance(len(file.header))
            for tensor in file.tensors:
                if tensor.name in edits:
                    _write_edited(tensor, edits[tensor.name], out)
                    advance(tensor.num_bytes)
                else:
                    _copy_range(source, out, tensor, advance)
            out.flush()
            os.fsync(out.fileno())
        writing.rename(target)
        self._state["done"].append(file.path.name)
        self._save()

    def copy_side_files(self, base: Checkpoint, adapter: AdapterFile) -> None:
        """Index, configuration and licence of the base, and its tokenizer unless the adapter has its own."""
        for file in base.folder.iterdir():
            kept = file.suffix not in _WEIGHT_SUFFIXES and file.name not in _NOT_COPIED
            if file.is_file() and kept and not file.name.startswith("."):
                shutil.copyfile(file, self.path / file.name)
        if base.index is not None:
            shutil.copyfile(base.index, self.path / INDEX_NAME)
        folder = adapter.folder if (adapter.folder / "tokenizer_config.json").is_file() else base.folder
        for file in (file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
            if file.is_dir():
                shutil.copytree(file, self.path / file.name, dirs_exist_ok=True)
            else:
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
        """Keep the folder only where a rerun can use what it holds."""
        if not self._state["done"]:
            shutil.rmtree(self.path, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty where there is none, or a torn one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _copy_range(source: BinaryIO, out: BinaryIO, tensor: StoredTensor, advance: Callable[[int], Any]) -> None:
    source.seek(tensor.start)
    left = tensor.num_bytes
    while left:
        chunk = source.read(min(left, _CHUNK_BYTES))
        if not chunk:
            raise UserError(f"{tensor.file} ended inside {tensor.name}: the file is truncated, copy it again")
        out.write(chunk)
        left -= len(chunk)
        advance(len(chunk))


def _write_edited(tensor: StoredTensor, edit: Edit, out: BinaryIO) -> None:
    before = tensor.read()
    dtype = before.dtype
    merged = edit(before)
    assert merged.dtype == dtype and tuple(merged.shape) == tensor.shape, tensor.name
    flat = merged.contiguous().view(-1)
    for block in row_blocks(flat.numel(), 1):
        if not bool(torch.isfinite(flat[block]).all()):
            raise UserError(
                f"{tensor.name} is not finite after merging: the adapter or the base is broken; "
                "use an earlier checkpoint of the adapter"
            )
    out.write(memoryview(flat.view(torch.uint8).numpy()))

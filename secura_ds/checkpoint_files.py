"""A safetensors checkpoint as byte ranges: what lies where, read one tensor at a time and without mmap.

Plain reads keep memory honest: a mapped file counts as memory of the process, a read buffer is freed.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

from secura_ds.errors import UserError, shown
from secura_ds.reading import read_json_object

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: bytes [start, stop) of `file`, counted from the file's beginning."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.stop - self.start

    def read(self, memory: torch.Tensor | None = None) -> torch.Tensor:
        """The whole tensor, in its stored dtype and in memory of its own, or in `memory`, uint8 (num_bytes,).

        Raises:
            UserError: the dtype is not one of `DTYPES` (a packed, already quantized weight, for instance).
        """
        if self.dtype not in DTYPES:
            raise UserError(
                f"{self.file}: {self.name} is stored as {self.dtype}, not as one of {', '.join(DTYPES)}; "
                "use the checkpoint in 16 or 32 bits"
            )
        memory = torch.empty(self.num_bytes, dtype=torch.uint8) if memory is None else memory
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            view, filled = memoryview(memory.numpy()), 0
            while filled < self.num_bytes:
                count = file.readinto(view[filled:])
                if not count:
                    raise UserError(
                        f"{self.file} ended inside {self.name}: the file is truncated, copy it again"
                    )
                filled += count
        return memory.view(DTYPES[self.dtype]).view(self.shape)


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file: its header, byte for byte, and its tensors in file order."""

    path: Path
    header: bytes
    tensors: tuple[StoredTensor, ...]
    size: int

    @property
    def metadata(self) -> dict[str, str]:
        """The free entries of the header."""
        found = json.loads(self.header[8:]).get("__metadata__")
        return found if isinstance(found, dict) else {}

    def fingerprint(self) -> list[object]:
        """Size, time of change and header hash: enough to notice that the file was replaced."""
        return [self.size, self.path.stat().st_mtime_ns, hashlib.sha256(self.header).hexdigest()]


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: its safetensors files and every tensor in them by name."""

    folder: Path
    files: tuple[TensorFile, ...]
    tensors: dict[str, StoredTensor]
    index: Path | None

    @property
    def num_bytes(self) -> int:
        """Size of all files in bytes, headers included."""
        return sum(file.size for file in self.files)


def open_tensor_file(path: Path) -> TensorFile:
    """Read and check the header of one safetensors file.

    Raises:
        UserError: the file is missing, truncated, or not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path, or copy the checkpoint again")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise UserError(f"{path} is truncated or not a safetensors file ({size} bytes); copy it again")
        header = prefix + file.read(length)
    try:
        tensors = _parse(path, header)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} has a damaged safetensors header ({error}); copy it again") from error
    position = len(header)
    for tensor in tensors:
        if tensor.start != position:
            raise UserError(
                f"{path} has a damaged safetensors header (gap before {shown(tensor.name)}); copy it again"
            )
        position = tensor.stop
    if position != size:
        raise UserError(
            f"{path} is truncated or damaged: {size} bytes where its header says {position}; copy it again"
        )
    return TensorFile(path, header, tensors, size)


def _parse(path: Path, header: bytes) -> tuple[StoredTensor, ...]:
    entries = json.loads(header[8:])
    tensors = []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        start, stop = (len(header) + int(offset) for offset in entry["data_offsets"])
        shape = tuple(int(n) for n in entry["shape"])
        dtype = DTYPES.get(entry["dtype"])
        fills = dtype is None or math.prod(shape) * dtype.itemsize == stop - start
        if stop < start or min(shape, default=0) < 0 or not fills:
            raise ValueError(f"{name}: shape {list(shape)} does not fill its bytes")
        tensors.append(StoredTensor(name, path, entry["dtype"], shape, start, stop))
    return tuple(sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open every safetensors file of a model folder, by its index if it has one.

    Every reader of such a folder comes here first, also one that leaves the reading to a library.

    Raises:
        UserError: no safetensors weights, an adapter beside them, a file is missing or damaged, or index and
            files disagree.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a Hugging Face checkpoint")
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} holds adapter_config.json, an adapter that transformers would put on its model: "
            "give the folder of the model alone"
        )
    index = folder / INDEX_NAME
    if index.is_file():
        return _open_indexed(folder, index)
    if not (folder / SINGLE_NAME).is_file():
        _refuse_pickles(folder)
        raise UserError(
            f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}; "
            "load the model with transformers and save_pretrained it to get safetensors"
        )
    file = open_tensor_file(folder / SINGLE_NAME)
    return Checkpoint(folder, (file,), {tensor.name: tensor for tensor in file.tensors}, None)


def _refuse_pickles(folder: Path) -> None:
    pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
    if pickles:
        raise UserError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which can run any code when it is read: "
            "get the checkpoint as safetensors"
        )


def _open_indexed(folder: Path, index: Path) -> Checkpoint:
    weight_map = read_json_object(index, remedy="copy it again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} is not a safetensors index (it has no weight_map); copy it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise UserError(
                f"{index} places weights in {shown(repr(name))}, which is no file beside it: do not use this "
                "checkpoint, or fetch it again from where it was published"
            )
    files = tuple(open_tensor_file(folder / name) for name in sorted(set(weight_map.values())))
    tensors = {tensor.name: tensor for file in files for tensor in file.tensors}
    for name, file_name in weight_map.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise UserError(
                f"{index} places {shown(name)} in {file_name}, which does not hold it; "
                "copy the checkpoint again"
            )
    return Checkpoint(folder, files, tensors, index)

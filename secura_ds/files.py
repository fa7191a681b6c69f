"""Writing files so that a killed run never leaves one that looks whole and is not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from secura_ds.errors import UserError


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a full disk or a place that cannot be written into one line; anything else passes through."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            what = "your quota on the disk" if number == errno.EDQUOT else "the disk"
            raise UserError(f"{what} holding {path} is full: free some space and run again") from error
        if isinstance(error, PermissionError) or number == errno.EROFS:
            raise UserError(f"no permission to write {path}: choose another folder or its rights") from error
        if isinstance(error, NotADirectoryError | IsADirectoryError | FileExistsError):
            raise UserError(
                f"{path} cannot be written: a file is where a folder should be, or the reverse "
                f"({error.strerror}); choose another path"
            ) from error
        raise


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` that takes its place once the block has ended well."""
    path = Path(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse, before the work whose result goes there, a file that could not be written.

    Raises:
        UserError: it is a folder, or lies where nothing may be written.
    """
    with explained(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, wholly or not at all.

    Raises:
        UserError: the disk is full or the folder may not be written.
    """
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, wholly or not at all."""
    with _replacing(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, wholly or not at all."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def atomic_folder(
    path: Path, *, overwrite: bool = False, replaces: Callable[[], bool] = lambda: True
) -> Iterator[Path]:
    """A temporary sibling folder that becomes `path` once the block has ended well.

    Args:
        overwrite: `path` may exist.
        replaces: asked at the end if `path` exists: whether the new folder takes its place, or goes.

    Raises:
        UserError: `path` exists and `overwrite` is false; the disk is full.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} already exists: choose another folder, or allow overwriting it")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        temporary.chmod(0o755)
        try:
            yield temporary
            if not path.exists() or replaces():
                swap_folder(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def swap_folder(new: Path, path: Path) -> None:
    """Put `new` at `path`; what was there goes only after the new folder stands."""
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        path.rename(old / "content")
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.rename(path)
    _sync(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder that is complete or gone at every moment, also if the process is killed meanwhile."""
    hidden = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    path.rename(hidden / "content")
    shutil.rmtree(hidden, ignore_errors=True)


def remove_left_overs(folder: Path) -> None:
    """Delete what writes of a killed process left in `folder` under temporary names."""
    for left_over in [*folder.glob(".*.partial"), *folder.glob(".*.old")]:
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
        else:
            left_over.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Have the disk hold the names in `folder`, not only what they name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically and reopen it: every key is there and no tensor is empty.

    Raises:
        UserError: a tensor is empty (a sharded weight was not gathered), or the disk is full.
    """
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty:
        raise UserError(f"{path}: {len(empty)} tensors are empty, first {empty[0]}; nothing was written")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _replacing(Path(path)) as temporary:
        save_file(contiguous, str(temporary), metadata={"format": "pt", **(metadata or {})})
        with safe_open(str(temporary), framework="pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        wrong = sorted(key for key, tensor in contiguous.items() if found.get(key) != tuple(tensor.shape))
        if wrong:
            raise UserError(f"{path}: the written file lacks or misshapes {wrong}; nothing was kept")

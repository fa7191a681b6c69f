"""Finished parts of an evaluation, kept until all are there: an interrupted one goes on after them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from secura_ds.files import atomic_write_json

logger = logging.getLogger(__name__)


class Parts:
    """What was measured so far, by name. For an evaluation in one process.

    Args:
        path: the file that keeps it.
        inputs: what the measurements depend on, JSON-able; parts of other inputs are not used.
    """

    def __init__(self, path: Path, inputs: Mapping[str, Any]) -> None:
        self._path, self._inputs = path, json.loads(json.dumps(inputs))
        self._done: dict[str, Any] = {}
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["inputs"] == self._inputs:
                self._done = dict(kept["done"])
        except (OSError, ValueError, KeyError, TypeError):
            return
        if self._done:
            logger.info("going on after %s, which %s holds", ", ".join(self._done), path)

    def measured(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """One part: as it was kept, or measured and kept.

        Raises:
            UserError: the disk is full; or what `measure` raises.
        """
        if name not in self._done:
            self._done[name] = measure()
            atomic_write_json(self._path, {"inputs": self._inputs, "done": self._done})
        found: dict[str, Any] = self._done[name]
        return found

    def forget(self) -> None:
        """All parts are where they belong: remove the file."""
        self._path.unlink(missing_ok=True)


def fingerprints(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of change (ns) of files, and of the files in folders, by path."""
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    stats = {str(file): file.stat() for file in files if file.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

"""Finished parts of an evaluation, kept until all are there: an interrupted one goes on after them.

Every rank calls the same; the main process reads and writes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from secura_ds.files import atomic_write_json
from secura_ds.ranks import on_main

logger = logging.getLogger(__name__)


class Parts:
    """What was measured so far, by name.

    Args:
        path: the file that keeps it.
        inputs: what the measurements depend on, JSON-able; parts of other inputs are not used.
    """

    def __init__(self, path: Path, inputs: Mapping[str, Any]) -> None:
        self._path, self._inputs = path, json.loads(json.dumps(inputs))
        self._done: dict[str, Any] = on_main(self._read)
        if self._done:
            logger.info("going on after %s, which %s holds", ", ".join(self._done), path)

    def _read(self) -> dict[str, Any]:
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            return dict(kept["done"]) if kept["inputs"] == self._inputs else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def measured(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """One part: as it was kept, or measured and kept.

        Raises:
            UserError: the disk is full; or what `measure` raises.
        """
        if name not in self._done:
            self._done[name] = measure()
            kept = {"inputs": self._inputs, "done": self._done}
            on_main(lambda: atomic_write_json(self._path, kept))
        found: dict[str, Any] = self._done[name]
        return found

    def forget(self) -> None:
        """All parts are where they belong: remove the file."""
        on_main(lambda: self._path.unlink(missing_ok=True))


def fingerprints(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of change (ns) of files, and of the files in folders, by path."""
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    stats = {str(file): file.stat() for file in files if file.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

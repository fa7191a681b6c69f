"""Settings of a folder that was moved together with the files it was made from."""

from __future__ import annotations

import os
from typing import Any


def same_setting(old: Any, new: Any, there: str | None, here: str | None) -> bool:
    """Whether two settings are the same, or name files that lie to a folder as they did before it was moved.

    Args:
        there: the folder when `old` was written down; None or a relative one says nothing.
        here: the folder now.
    """
    if old == new:
        return True
    if not there or not here or not os.path.isabs(there) or not os.path.isabs(here):
        return False
    return bool(_seen_from(old, there) == _seen_from(new, here))


def _seen_from(value: Any, folder: str) -> Any:
    """A setting, or those within it, with absolute paths as seen from `folder`."""
    if isinstance(value, dict):
        return {name: _seen_from(inner, folder) for name, inner in value.items()}
    if isinstance(value, list):
        return [_seen_from(inner, folder) for inner in value]
    return os.path.relpath(value, folder) if isinstance(value, str) and os.path.isabs(value) else value

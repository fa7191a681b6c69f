"""Fixtures of the merge's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from merge_toys import make_base, make_secura


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return make_secura(tmp_path / "adapter", base)

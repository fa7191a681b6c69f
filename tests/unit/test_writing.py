"""Places that cannot be written are said in one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from secura_ds.errors import UserError
from secura_ds.files import atomic_write_json, check_writable, explained


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk holding .* is full"),
        (errno.EDQUOT, "your quota on the disk holding .* is full"),
        (errno.EACCES, "no permission to write"),
        (errno.EROFS, "no permission to write"),
        (errno.ENOTDIR, "a file is where a folder should be"),
        (errno.EISDIR, "a file is where a folder should be"),
    ],
)
def test_what_the_system_refuses_is_one_line(number: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said), explained(tmp_path):
        raise OSError(number, os.strerror(number))


def test_a_path_below_a_file_and_one_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.json", tmp_path):
        with pytest.raises(UserError, match="choose another path"):
            atomic_write_json(path, {})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_place_is_tried_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "a.json")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("kept")
    check_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    for path in (tmp_path / "file" / "a.json", tmp_path):
        with pytest.raises(UserError, match="choose another path"):
            check_writable(path)


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="stale"), explained(tmp_path):
        raise OSError(errno.ESTALE, "stale")

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path

import pytest
import torch

from secura_ds.errors import UserError
from secura_ds.training import checkpoint as files
from secura_ds.training.checkpoint import Checkpoint


def make(step: int) -> Checkpoint:
    values = torch.full((3, 2), float(step))
    return Checkpoint(
        {"a": values}, {"a/exp_avg": values + 1}, {"step": step}, json.dumps({"global_step": step})
    )


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = files.write(tmp_path, 12, make(12), keep=2)
    assert path.name == "step-000012"
    read = files.read(path)
    assert torch.equal(read.trained["a"], torch.full((3, 2), 12.0))
    assert torch.equal(read.optimizer["a/exp_avg"], torch.full((3, 2), 13.0))
    assert read.state == {"step": 12}
    assert json.loads(read.trainer_state) == {"global_step": 12}


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100, 20):
        files.write(tmp_path, step, make(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000020", "step-000100"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    files.write(tmp_path, 1, make(1), keep=3)
    newest = files.write(tmp_path, 2, make(2), keep=3)
    victim = newest / "optimizer.safetensors"
    content = victim.read_bytes()
    if damage == "truncate":
        victim.write_bytes(content[:-4])
    elif damage == "flip":
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        victim.unlink()
    else:
        (newest / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        found = files.latest(tmp_path)
    assert found is not None and found.name == "step-000001"
    assert "step-000002 is damaged" in caplog.text


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert files.latest(tmp_path / "missing") is None


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write(tmp_path, 1, make(1), keep=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("secura_ds.files.save_file", full)
    with pytest.raises(UserError, match="is full"):
        files.write(tmp_path, 2, make(2), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert files.latest(tmp_path) == tmp_path / "step-000001"


def test_damaged_factors_are_one_line(tmp_path: Path) -> None:
    assert files.read_factors(tmp_path) == {}
    files.write_factors(tmp_path, {"C": torch.ones(2)})
    assert torch.equal(files.read_factors(tmp_path)["C"], torch.ones(2))
    (tmp_path / "factors.safetensors").write_bytes(b"123")
    with pytest.raises(UserError, match="factors.safetensors is damaged"):
        files.read_factors(tmp_path)

"""Checkpoints on disk: whole or passed over, whatever was done to their files."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_toys import quiet_environment

from secura_ds.errors import UserError
from secura_ds.files import remove_left_overs
from secura_ds.training import checkpoint as files
from secura_ds.training.checkpoint import Checkpoint


def make(step: int) -> Checkpoint:
    values = torch.full((3, 2), float(step))
    return Checkpoint(
        {"a": values}, {"a/exp_avg": values + 1}, {"step": step}, json.dumps({"global_step": step})
    )


def write(checkpoints: Path, step: int, *, keep: int, value: int | None = None) -> Path:
    with files.draft(checkpoints, step, keep=keep) as draft:
        draft.add_folded({"w": torch.full((2, 2), float(step)), "v": torch.zeros(3)})
        draft.add_folded({"x": torch.ones(1)})
        draft.finish(make(step if value is None else value), None)
    return files.folder_of(checkpoints, step)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, 12, keep=2)
    assert path.name == "step-000012"
    read = files.read(path)
    assert torch.equal(read.trained["a"], torch.full((3, 2), 12.0))
    assert torch.equal(read.optimizer["a/exp_avg"], torch.full((3, 2), 13.0))
    assert read.state == {"step": 12}
    assert json.loads(read.trainer_state) == {"global_step": 12}
    folded = dict(files.read_folded(path))
    assert torch.equal(folded.pop("w"), torch.full((2, 2), 12.0))
    assert {name: value.shape for name, value in folded.items()} == {"v": (3,), "x": (1,)}


def test_its_size_is_said_in_words(tmp_path: Path) -> None:
    with files.draft(tmp_path, 1, keep=1) as draft:
        draft.add_folded({"w": torch.zeros(500_000)})
        said = draft.finish(make(1), None)
    assert said == "0.0 MB, and 2.0 MB of folded weights"


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100, 20):
        write(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000020", "step-000100"]


FILES = (
    "trained.safetensors", "optimizer.safetensors", "folded-00001.safetensors", "folded-00002.safetensors",
    "state.json", "trainer_state.json", "manifest.json",
)  # fmt: skip


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut off":
        path.write_bytes(content[:-4])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut off", "emptied", "flipped", "removed"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1, keep=3)
    damage(write(tmp_path, 2, keep=3) / name, how)
    with caplog.at_level(logging.WARNING):
        found = files.latest(tmp_path)
    assert found is not None and found.name == "step-000001"
    assert "step-000002 is damaged" in caplog.text and name in caplog.text


@pytest.mark.parametrize(
    "manifest",
    ["{}", "[]", "null", "1", '{"format": 2, "files": {}, "factors": null}', '{"format": 2, "files": []}'],
)
def test_a_manifest_that_says_nothing_is_damage(tmp_path: Path, manifest: str) -> None:
    path = write(tmp_path, 1, keep=1)
    (path / "manifest.json").write_text(manifest)
    assert files.latest(tmp_path) is None


def test_every_flipped_bit_of_a_manifest_is_damage(tmp_path: Path) -> None:
    """Also one in what it says of the factors, which would then be blamed in its place."""
    expected = files.write_factors(tmp_path, FACTORS)
    with files.draft(tmp_path, 1, keep=1) as draft:
        draft.finish(make(1), expected)
    manifest = tmp_path / "step-000001" / "manifest.json"
    content = manifest.read_bytes()
    for place in range(len(content)):
        flipped = content[place] ^ (1 << place % 8)
        manifest.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        assert files.damage_of(manifest.parent) is not None, content[max(0, place - 20) : place + 20]
    manifest.write_bytes(content)
    assert files.damage_of(manifest.parent) is None


def test_what_damaged_checkpoints_of_later_steps_cost_nothing(tmp_path: Path) -> None:
    """They must not count among those that are kept: the next save would remove the only whole one."""
    write(tmp_path, 1, keep=2)
    for step in (4, 5):
        damage(write(tmp_path, step, keep=3) / "state.json", "removed")
    found = files.latest(tmp_path)
    assert found is not None
    files.set_aside_after(tmp_path, files.step_of(found))
    write(tmp_path, 3, keep=2)
    aside = ["damaged-step-000004", "damaged-step-000005"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*aside, "step-000001", "step-000003"]
    damage(write(tmp_path, 4, keep=2) / "state.json", "removed")
    files.set_aside_after(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [*aside, "step-000003"]


def test_a_whole_checkpoint_is_not_replaced_by_another_of_its_step(tmp_path: Path) -> None:
    path = write(tmp_path, 3, keep=2)
    before = path.stat().st_ino
    write(tmp_path, 3, keep=2)
    assert path.stat().st_ino == before
    damage(path / "state.json", "flipped")
    write(tmp_path, 3, keep=2)
    assert path.stat().st_ino != before and files.damage_of(path) is None
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"]


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert files.latest(tmp_path / "missing") is None


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, keep=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("secura_ds.files.save_file", full)
    with pytest.raises(UserError, match="is full"):
        write(tmp_path, 2, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert files.latest(tmp_path) == tmp_path / "step-000001"


KILLED = """
import sys
from pathlib import Path
import torch
from secura_ds.training import checkpoint as files
sys.path.insert(0, sys.argv[2])
from test_checkpoint import write
for step in range(1, 10**6):
    write(Path(sys.argv[1]), step, keep=2)
    print(step, flush=True)
"""


def test_a_killed_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Five kills at different moments: what was said to be saved is there, or something newer is."""
    checkpoints, here = tmp_path / "checkpoints", str(Path(__file__).parent)
    environment = quiet_environment()
    environment["PYTHONPATH"] += f":{Path(here).parents[1]}"
    for number in range(5):
        shutil.rmtree(checkpoints, ignore_errors=True)
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(checkpoints), here],
            env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        saved = [int(process.stdout.readline()) for _ in range(3)]
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.0031 * number)
        os.kill(process.pid, signal.SIGKILL)
        saved += [int(line) for line in process.communicate()[0].split()]
        found = files.latest(checkpoints)
        assert found is not None and files.step_of(found) >= saved[-1]
        remove_left_overs(checkpoints)
        assert all(path.name.startswith("step-") for path in checkpoints.iterdir())


FACTORS = {"C": torch.ones(2)}


def test_factors_are_known_by_their_fingerprint(tmp_path: Path) -> None:
    assert files.write_factors(tmp_path, {}) is None
    assert files.has_factors(tmp_path, None) and files.read_factors(tmp_path, None) == {}
    expected = files.write_factors(tmp_path, FACTORS)
    assert expected is not None
    assert files.has_factors(tmp_path, expected)
    assert torch.equal(files.read_factors(tmp_path, expected)["C"], torch.ones(2))
    with files.draft(tmp_path, 1, keep=1) as draft:
        draft.finish(make(1), expected)
    assert files.factors_of(tmp_path / "step-000001") == expected


@pytest.mark.parametrize("how", ["cut off", "emptied", "flipped", "removed"])
def test_damaged_factors_are_mended_by_the_same_ones_only(tmp_path: Path, how: str) -> None:
    expected = files.write_factors(tmp_path, FACTORS)
    assert expected is not None
    damage(tmp_path / files.FACTORS, how)
    assert not files.has_factors(tmp_path, expected)
    with pytest.raises(UserError, match=r"factors.safetensors is missing or damaged.*--overwrite"):
        files.mend_factors(tmp_path, {"C": torch.zeros(2)}, expected)
    assert not files.has_factors(tmp_path, expected)
    files.mend_factors(tmp_path, FACTORS, expected)
    assert files.has_factors(tmp_path, expected)

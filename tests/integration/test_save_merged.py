"""`training.save_merged` in one process: the offline merge's files, ends and refusals, going on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import export_toys
import pytest
from safetensors.torch import load_file, save_file

from launch.train import main
from secura_ds.errors import run_command
from secura_ds.merge import work as work_module
from secura_ds.stopping import REQUEUE
from secura_ds.training import callbacks

Run = Callable[..., int]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_toys.write_export_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def run(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in the toy's folder: run("name", "a.b=c", ..., "--resume")."""
    monkeypatch.chdir(toy.parent)

    def call(output: str, *options: str) -> int:
        settings = [f"--set={o}" for o in (*export_toys.COMMON, *options) if not o.startswith("--")]
        flags = [option for option in options if option.startswith("--")]
        return run_command(main, [str(toy), f"--set=training.output_dir={output}", *settings, *flags])

    return call


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(("name", "options"), (export_toys.CASES | export_toys.CASES_ALONE).items())
def test_the_files_are_those_of_the_offline_merge(
    run: Run, toy: Path, name: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(name, *options) == 0
    assert f"the adapter is {name}/adapter, the merged checkpoint {name}/merged" in capsys.readouterr().out
    assert export_toys.differences(toy.parent, name, options) == []
    written = json.loads((toy.parent / name / "merge.json").read_text())
    assert written == json.loads((toy.parent / name / "merged" / "merge.json").read_text())
    assert json.loads((toy.parent / name / "run.json").read_text())["merged"] == written["out"]
    assert written["max_logit_gap"] is not None and written["kl"] is not None


def test_a_signal_in_the_export_is_finished_by_resume(
    run: Run, toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, written = work_module._write_edited, []

    def signalling(tensor: Any, *rest: Any) -> None:
        write(tensor, *rest)
        written.append(tensor.name)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(work_module, "_write_edited", signalling)
        assert run("cut") == REQUEUE
        assert "interrupted" in capsys.readouterr().out
        assert json.loads(Path("cut/run.json").read_text())["status"] == "interrupted"
        assert Path("cut/merged.partial").is_dir() and not Path("cut/merged").exists()
        metrics, before = Path("cut/metrics.jsonl").read_text(), list(written)
        trained = Path("cut/adapter/adapter_config.json").read_text()
        assert run("cut", "--resume") == 0
    # Nothing was trained again, and what was merged before the signal was not merged again.
    assert Path("cut/metrics.jsonl").read_text() == metrics
    assert Path("cut/adapter/adapter_config.json").read_text() == trained
    assert len(before) == 2 and len(written) == 4 and len(set(written)) == 4
    assert not Path("cut/merged.partial").exists()
    assert export_toys.differences(toy.parent, "cut", []) == []


def test_a_full_disk_leaves_nothing_half_written(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(work_module, "_write_edited", full)
        assert run("full") == 2
    (error,) = errors(capsys)
    assert "is full: free some space and run again" in error
    assert Path("full/adapter").is_dir() and not Path("full/merged").exists()
    assert not list(Path("full").glob("merged*/*.writing")) and not Path("full/run.json").exists()
    assert run("full", "--resume") == 0
    assert Path("full/merged/config.json").is_file()


def test_a_finished_run_is_merged_later(run: Run, toy: Path) -> None:
    assert run("later", "training.save_merged=false") == 0
    assert not Path("later/merged").exists()
    metrics = Path("later/metrics.jsonl").read_text()
    assert run("later", "--resume") == 0
    assert Path("later/metrics.jsonl").read_text() == metrics
    assert export_toys.differences(toy.parent, "later", []) == []
    assert run("later", "--overwrite", "training.save_merged=false") == 0
    assert not Path("later/merged").exists()


def test_a_base_that_cannot_be_merged_is_refused_before_training(
    run: Run, toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(callbacks.Trainer, "train", lambda *_, **__: pytest.fail("training has begun"))
    torch_only = toy.parent / "torch-only"
    shutil.copytree(toy.parent / "backbone", torch_only, ignore=shutil.ignore_patterns("*.safetensors*"))
    (torch_only / "pytorch_model.bin").write_bytes(b"weights")
    renamed = toy.parent / "renamed"
    shutil.copytree(toy.parent / "backbone", renamed, ignore=shutil.ignore_patterns("model*"))
    tensors: dict[str, Any] = {}
    for shard in (toy.parent / "backbone").glob("*.safetensors"):
        tensors |= load_file(shard)
    names = {name: name.removeprefix("model.") for name in tensors}
    save_file({names[n]: t for n, t in tensors.items()}, renamed / "model.safetensors", {"format": "pt"})
    Path("taken/merged").mkdir(parents=True)
    for output, options, message in (
        ("new", ["backbone.model=torch-only"], "torch-only has its weights in pytorch_model.bin"),
        ("new", ["backbone.model=renamed"], "does not store model.layers.0.self_attn.q_proj.weight"),
        ("taken", [], "taken/merged already exists: move it elsewhere"),
    ):
        assert run(output, *options) == 2
        (error,) = errors(capsys)
        assert error.startswith("error: training.save_merged is true, but ") and message in error
        assert not Path(output, "recipe.resolved.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
        assert run("new") == 2
    assert "training.save_merged needs 0.00 GB, but the disk holding" in errors(capsys)[0]


def test_a_backbone_in_the_run_is_not_overwritten(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("first") == 0
    before = Path("first/merged/config.json").read_bytes()
    assert run("first", "backbone.model=first/merged", "--overwrite") == 2
    assert "which --overwrite would delete" in errors(capsys)[0]
    assert run("first", "backbone.model=first/merged", "--resume") == 2
    assert "would overwrite the backbone" in errors(capsys)[0]
    assert Path("first/merged/config.json").read_bytes() == before
    assert run("second", "backbone.model=first/merged") == 0

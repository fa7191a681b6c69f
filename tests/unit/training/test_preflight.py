from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from training_toys import write_toy

from secura_ds.errors import UserError
from secura_ds.recipe import Recipe, load_recipe
from secura_ds.training import preflight


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")


def sharded(path: Path, *overrides: str) -> Recipe:
    return load_recipe(path, ["training.deepspeed=zero3.json", *overrides])


def test_bad_versions_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"DeepSpeed 0\.19\.2 mixes data types.*8072"):
        preflight.check_deepspeed_version("0.19.2")
    preflight.check_deepspeed_version("0.19.8")


@pytest.mark.parametrize(("version", "reentrant"), [("0.18.9", True), ("0.19.3", True), ("0.19.4", False)])
def test_kind_of_checkpointing_follows_the_version(
    version: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_installed_version", lambda: version)
    assert preflight.reentrant_checkpointing({"zero_optimization": {"stage": 3}}) is reentrant
    assert preflight.reentrant_checkpointing({"zero_optimization": {"stage": 2}}) is False
    assert preflight.reentrant_checkpointing(None) is False


def test_one_process_goes_without_deepspeed_and_says_so(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert preflight.deepspeed_settings(sharded(path)) is None
    assert "zero3.json) is not used" in caplog.text


def test_a_launched_process_reads_the_configuration(path: Path, launched: None) -> None:
    settings = preflight.deepspeed_settings(sharded(path))
    assert settings is not None and settings["zero_optimization"]["stage"] == 3


def test_several_processes_need_a_configuration(path: Path, launched: None) -> None:
    with pytest.raises(UserError, match="training.deepspeed is null, but 2 processes"):
        preflight.deepspeed_settings(load_recipe(path))


def test_settings_that_cannot_work(path: Path, launched: None) -> None:
    with pytest.raises(UserError, match="adafactor.*adamw_torch"):
        preflight.deepspeed_settings(sharded(path, "training.optimizer=adafactor"))
    (path.parent / "zero0.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    with pytest.raises(UserError, match="stage is 0: 1, 2 or 3"):
        preflight.deepspeed_settings(load_recipe(path, ["training.deepspeed=zero0.json"]))


def test_half_precision_needs_a_gpu(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="float16"):
        preflight.check_machine(load_recipe(path, ["backbone.dtype=float16"]))


def test_a_tracker_must_be_installed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "mlflow" else name)
    with pytest.raises(UserError, match='report_to has "mlflow".*pip install mlflow'):
        preflight.check_machine(load_recipe(path, ['training.report_to=["tensorboard","mlflow"]']))


def test_threads_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    try:
        for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, "4")
            preflight.limit_threads()
            assert torch.get_num_threads() == 1
            monkeypatch.delenv(name)
        preflight.limit_threads()
        assert torch.get_num_threads() == 6
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        preflight.limit_threads()
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)

from __future__ import annotations

import json
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


def test_a_configuration_needs_a_launcher(path: Path) -> None:
    with pytest.raises(UserError, match=r"zero3.json\", but this is one process .*training.deepspeed=null"):
        preflight.deepspeed_settings(sharded(path))


def test_a_launched_process_reads_the_configuration(path: Path, launched: None) -> None:
    settings = preflight.deepspeed_settings(sharded(path))
    assert settings is not None and settings["zero_optimization"]["stage"] == 3
    filled = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    assert [settings[key] for key in filled] == [2, 2, 8]
    assert (settings["bf16"], settings["fp16"]) == ({"enabled": False}, {"enabled": False})


def test_equal_values_do_not_contradict(path: Path, launched: None) -> None:
    own = json.loads((path.parent / "zero3.json").read_text())
    own |= {"train_batch_size": 8, "gradient_accumulation_steps": 2, "gradient_clipping": 1}
    (path.parent / "equal.json").write_text(json.dumps(own))
    assert preflight.deepspeed_settings(load_recipe(path, ["training.deepspeed=equal.json"])) is not None


def test_a_step_needs_as_many_rows_as_it_takes(path: Path, launched: None) -> None:
    preflight.check_examples(8, load_recipe(path))
    with pytest.raises(UserError, match=r"there are 7 rows .* takes 2 x 2 x 2 = 8 "):
        preflight.check_examples(7, load_recipe(path))


def test_bf16_needs_a_card_that_computes_in_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old card")
    with pytest.raises(UserError, match='"bfloat16", which an old card does not compute in: use "float16"'):
        preflight.check_machine(load_recipe(path, ["backbone.dtype=bfloat16"]))


def test_offloading_without_a_gpu_is_named_a_setting_without_effect(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    preflight.check_machine(load_recipe(path, ["training.activation_offloading=true"]))
    assert "training.activation_offloading has no effect without a GPU" in caplog.text


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

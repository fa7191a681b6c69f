"""Folders from strangers, command by command: read as data, or refused in one line, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_toys import toy_recipe, write_toy

from launch import evaluate, merge, plan, train
from secura_ds.checkpoint_files import INDEX_NAME, open_checkpoint, open_tensor_file
from secura_ds.errors import UserError, run_command
from secura_ds.merge.quantization import Quantization
from secura_ds.recipe import load_recipe

PICKLES = [
    *(
        "adapter_model.bin",
        "pytorch_model.bin",
        "optimizer.pt",
        "scheduler.pt",
        "scaler.pt",
        "training_args.bin",
    ),
    *("rng_state.pth", "rng_state_0.pth", "tokenizer.pkl"),
]


class Payload:
    """Whoever unpickles it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, a recipe that evaluates it, and a finished run of two steps in `run/`."""
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    (folder / "probe.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 0}\n')
    settings = toy_recipe()
    settings["training"] |= {"output_dir": str(folder / "run"), "max_steps": 2, "save_steps": 1}
    settings["evaluation"] = {
        "task": {"path": "rows.jsonl", "max_items": 1, "max_new_tokens": 2},
        "probes": [{"kind": "multiple_choice", "path": "probe.jsonl"}],
    }
    (folder / "recipe.json").write_text(json.dumps(settings))
    assert _run(train, folder / "recipe.json") == 0
    return folder


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a payload makes when it runs; no question may be put to the user either."""

    def refuse(*_: object) -> str:
        raise AssertionError("the user was asked")

    monkeypatch.setattr("builtins.input", refuse)
    return tmp_path / "marker"


Run = Callable[..., str]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must fail in one line, and returns that line."""

    def run(command: ModuleType, *arguments: object) -> str:
        capfd.readouterr()
        status = _run(command, *arguments)
        captured = capfd.readouterr().err
        assert status == 2, captured
        assert "Traceback" not in captured and captured.count("error: ") == 1
        line = captured.split("error: ")[1].rstrip("\n")
        assert line.isprintable(), line
        return line

    return run


def _run(command: ModuleType, *arguments: object) -> int:
    return run_command(command.main, [str(argument) for argument in arguments])


def _plant(folder: Path, marker: Path) -> None:
    for name in PICKLES:
        torch.save(Payload(marker), folder / name)


def _copy(source: Path, target: Path, *, without: str = "") -> Path:
    shutil.copytree(source, target)
    if without:
        (target / without).unlink()
    return target


def _with_code(toy: Path, folder: Path, marker: Path, **settings: Any) -> Path:
    """A backbone whose settings name classes in a Python file beside them."""
    _copy(toy / "backbone", folder)
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    for name, changes in (
        ("config.json", {"auto_map": auto_map, **settings}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
    ):
        before = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(before | changes))
    (folder / "custom_generate").mkdir()
    for path in (folder / "evil.py", folder / "custom_generate" / "generate.py"):
        path.write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    return folder


def test_pickles_beside_safetensors_are_ignored(toy: Path, marker: Path, tmp_path: Path) -> None:
    base = _copy(toy / "backbone", tmp_path / "base")
    adapter = _copy(toy / "run" / "adapter", tmp_path / "adapter")
    for folder in (base, adapter):
        _plant(folder, marker)
    recipe = (evaluate, toy / "recipe.json", "--set", f"backbone.model={base}", "--quiet")
    assert _run(*recipe) == 0
    assert _run(*recipe, "--adapter", adapter) == 0
    assert _run(merge, "--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--quiet") == 0
    assert not marker.exists()
    assert {path.name for path in (tmp_path / "out").iterdir()}.isdisjoint(PICKLES)


def test_code_in_a_known_model_is_named_and_not_run(
    toy: Path, marker: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = _with_code(toy, tmp_path / "base", marker)
    assert _run(evaluate, toy / "recipe.json", "--model", base, "--quiet") == 0
    (warning,) = [record.getMessage() for record in caplog.records if "auto_map" in record.getMessage()]
    assert str(base) in warning and "not run" in warning
    into = ("--adapter", toy / "run" / "adapter", "--out", tmp_path / "out", "--quiet")
    assert _run(merge, "--base", base, *into) == 0
    assert not marker.exists()


def test_a_model_that_is_only_code_is_refused(toy: Path, marker: Path, refused: Run, tmp_path: Path) -> None:
    base = _with_code(toy, tmp_path / "base", marker, model_type="evil", architectures=["Evil"])
    recipe, out = toy / "recipe.json", tmp_path / "out"
    for command in (
        (evaluate, recipe, "--model", base),
        (train, recipe, "--set", f"backbone.model={base}", "--set", f"training.output_dir={out}"),
        (plan, recipe, "--set", f"backbone.model={base}"),
    ):
        line = refused(*command)
        assert "which is never run" in line and "trust_remote_code" not in line
    line = refused(merge, "--base", base, "--adapter", toy / "run" / "adapter", "--out", out)
    assert "its model cannot be built" in line
    assert not marker.exists() and not out.exists()


def test_the_class_of_a_model_is_a_model(toy: Path, tmp_path: Path) -> None:
    """`architectures` names an attribute of transformers, which holds other things than models, too."""
    base = _copy(toy / "backbone", tmp_path / "base")
    settings = json.loads((base / "config.json").read_text()) | {"architectures": ["AutoTokenizer"]}
    (base / "config.json").write_text(json.dumps(settings))
    into = ("--adapter", toy / "run" / "adapter", "--out", tmp_path / "out", "--quiet")
    assert _run(merge, "--base", base, *into) == 0


def test_an_adapter_beside_a_backbone_is_refused(toy: Path, refused: Run, tmp_path: Path) -> None:
    """transformers would take the model that the adapter names, and put the adapter on it."""
    base = _copy(toy / "backbone", tmp_path / "base")
    for path in (toy / "run" / "adapter").glob("adapter_*"):
        shutil.copy(path, base)
    line = refused(evaluate, toy / "recipe.json", "--model", base)
    assert "holds adapter_config.json" in line


def test_an_adapter_that_names_a_module_is_refused(toy: Path, refused: Run, tmp_path: Path) -> None:
    adapter = _copy(toy / "run" / "adapter", tmp_path / "adapter")
    settings = {"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "evil"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert "has megatron_config" in refused(evaluate, toy / "recipe.json", "--adapter", adapter)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "x"}, "cannot be loaded (Validation error"),
        ({"num_attention_heads": 0}, "cannot be loaded"),
        ({"hidden_size": 32}, "other shapes than its config.json"),
    ],
)
def test_a_damaged_configuration(
    toy: Path, refused: Run, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    base = _copy(toy / "backbone", tmp_path / "base")
    settings = json.loads((base / "config.json").read_text()) | changes
    (base / "config.json").write_text(json.dumps(settings))
    line = refused(evaluate, toy / "recipe.json", "--model", base)
    assert str(base) in line and words in line


def test_a_damaged_tokenizer(toy: Path, refused: Run, tmp_path: Path) -> None:
    base = _copy(toy / "backbone", tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    line = refused(evaluate, toy / "recipe.json", "--model", base)
    assert str(base) in line and "copy the checkpoint again" in line


def test_only_types_of_weights_are_taken_from_torch() -> None:
    record = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "load"}
    with pytest.raises(UserError, match=r"a\.json: bnb_4bit_compute_dtype is load"):
        Quantization.from_config(record, "a.json")


def test_a_link_is_no_way_out(toy: Path, tmp_path: Path) -> None:
    """Caches of the hub are folders of links."""
    base = _copy(toy / "backbone", tmp_path / "base")
    (base / "model.safetensors").rename(tmp_path / "blob")
    (base / "shard.safetensors").symlink_to("../blob")
    places = dict.fromkeys(load_file(tmp_path / "blob"), "shard.safetensors")
    (base / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert set(open_checkpoint(base).tensors) == set(places)
    assert _run(evaluate, toy / "recipe.json", "--model", base, "--quiet") == 0


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', "[" * 100_000, "\xff"])
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{INDEX_NAME}.*(copy it again|UTF-8)"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("shape", [[-1, -4], ["x"], [2], None])
@pytest.mark.parametrize("nested", [False, True])
def test_a_hostile_header(tmp_path: Path, shape: Any, nested: bool) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}}).encode()
    header = b'{"a":' * 5000 if nested else header
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(UserError, match="damaged safetensors header"):
        open_tensor_file(path)


@pytest.mark.parametrize("record", ["[1]", "{", "[" * 100_000])
def test_a_hostile_record_in_an_adapter(toy: Path, refused: Run, tmp_path: Path, record: str) -> None:
    adapter = _copy(toy / "run" / "adapter", tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "secura_ds.quantization": record})
    line = refused(merge, "--base", toy / "backbone", "--adapter", adapter, "--out", tmp_path / "out")
    assert "secura_ds.quantization" in line and "save the adapter again" in line


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".hidden", "", "a\nb", "a\x00b"])
def test_a_recipe_has_a_plain_name(toy: Path, name: str) -> None:
    with pytest.raises(UserError, match="name is "):
        load_recipe(toy / "recipe.json", [f"name={json.dumps(name)}"])

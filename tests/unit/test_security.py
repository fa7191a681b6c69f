"""Nothing that users exchange can run code, read files elsewhere, or carry secrets away."""

from __future__ import annotations

import ast
import json
import logging
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapter_toys as toys
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from training_toys import REPOSITORY, write_toy

from launch import evaluate as evaluate_command
from launch import merge as merge_command
from launch import report as report_command
from launch import train as train_command
from secura_ds.adapter import load_adapter
from secura_ds.backbones import load_model, load_tokenizer
from secura_ds.checkpoint_files import INDEX_NAME, open_checkpoint
from secura_ds.errors import UserError, run_command
from secura_ds.recipe import BackboneRecipe

SOURCES = [p for room in ("secura_ds", "launch", "benchmarks") for p in (REPOSITORY / room).rglob("*.py")]


class Payload:
    """Its pickle makes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "the payload ran"


def plant(marker: Path, *paths: Path) -> None:
    """Pickles of both kinds that torch writes: a bare one, and one inside a zip archive."""
    for number, path in enumerate(paths):
        if number % 2:
            torch.save(Payload(marker), path)
        else:
            path.write_bytes(pickle.dumps(Payload(marker)))


def backbone_of(folder: Path) -> BackboneRecipe:
    return BackboneRecipe(model=str(folder), dtype="float32", attention="eager")


def test_a_payload_would_run(marker: Path, tmp_path: Path) -> None:
    plant(marker, tmp_path / "x")
    pickle.loads((tmp_path / "x").read_bytes())
    assert marker.is_dir()


FORBIDDEN = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "exec", "eval",
    "torch.load", "numpy.load", "np.load", "pandas.read_pickle", "os.system", "torch.jit.load", "__import__",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all",
}  # fmt: skip


def test_no_source_reads_pickles_or_runs_text() -> None:
    assert len(SOURCES) > 100
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Call):
                names = [ast.unparse(node.func)]
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if keywords.get("shell") == "True" or keywords.get("allow_pickle") == "True":
                    names.append("exec")
                if keywords.get("trust_remote_code", "False") != "False":
                    names.append("exec")
                if "Loader" in keywords and keywords["Loader"] != "yaml.SafeLoader":
                    names.append("exec")
            elif isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            found += [f"{path.name}:{node.lineno} {name}" for name in names if name in FORBIDDEN]
    assert found == []


def test_every_load_of_transformers_says_that_no_code_is_trusted() -> None:
    """Unsaid, transformers asks the user at the terminal, who may say yes."""
    for path in (REPOSITORY / "secura_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                owner = ast.unparse(node.func).split(".")[0]
                if owner.startswith("Auto"):
                    said = {keyword.arg for keyword in node.keywords}
                    assert "trust_remote_code" in said, f"{path}:{node.lineno}"


# Pickles.


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "model.pt"])
def test_a_backbone_of_pickles_is_refused(tmp_path: Path, marker: Path, name: str) -> None:
    folder = tmp_path / "backbone"
    toys.toy_llama().save_pretrained(folder)
    plant(marker, folder / name)
    load_model(backbone_of(folder))  # beside safetensors it is not looked at
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"in {name}, a pickle, which can run any code"):
        load_model(backbone_of(folder))
    assert not marker.exists()


def test_an_adapter_of_pickles_is_refused(tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "adapter"
    config = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(toys.toy_llama(), config).save_pretrained(folder)
    plant(marker, folder / "adapter_model.bin", folder / "training_args.bin")
    load_adapter(toys.toy_llama(), folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="has no adapter_model.safetensors; other kinds of files can run"):
        load_adapter(toys.toy_llama(), folder)
    base = tmp_path / "base"
    toys.toy_llama().save_pretrained(base)
    arguments = ["--base", str(base), "--adapter", str(folder), "--out", str(tmp_path / "out"), "--quiet"]
    assert run_command(merge_command.main, arguments) == 2
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_a_checkpoint_full_of_pickles_is_resumed_without_them(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(write_toy(tmp_path))
    assert run_command(train_command.main, [recipe, "--set", "training.save_steps=4"]) == 0
    shutil.rmtree("run/checkpoints/step-000007")
    names = ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "pytorch_model.bin"]
    for folder in ("run/checkpoints/step-000004", "run/checkpoints", "run", "backbone", "run/adapter"):
        plant(marker, *(Path(folder) / name for name in names))
    assert run_command(train_command.main, [recipe, "--resume"]) == 0
    assert not marker.exists()


# Files elsewhere.


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", None, 3]
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "backbone"
    toys.toy_llama().save_pretrained(folder, max_shard_size="100KB")
    toys.toy_llama().save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "secret.safetensors")
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / INDEX_NAME).write_text(json.dumps(index))
    for read in (open_checkpoint, lambda place: load_model(backbone_of(place))):
        with pytest.raises(UserError, match="which is no file beside it: do not use this checkpoint"):
            read(folder)


# Code.


def with_code(folder: Path, marker: Path, model_type: str) -> Path:
    """A checkpoint that brings code for its configuration, tokenizer and model."""
    toys.toy_llama().save_pretrained(folder)
    code = f"import os\nos.mkdir({str(marker)!r})\nclass Config: pass\nclass Model: pass\n"
    (folder / "code.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": model_type, "auto_map": auto_map})
    )
    tokenizer = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Config", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def test_code_of_a_checkpoint_is_never_run(
    tmp_path: Path, marker: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = with_code(tmp_path / "known", marker, "llama")
    with caplog.at_level(logging.WARNING):
        load_model(backbone_of(known))
    assert "brings code of its own (auto_map in config.json), which is not run" in caplog.text
    unknown = with_code(tmp_path / "unknown", marker, "own")
    with pytest.raises(UserError, match="code that comes with the checkpoint, which is never run"):
        load_model(backbone_of(unknown))
    with pytest.raises(UserError):
        load_tokenizer(backbone_of(unknown))
    assert not marker.exists()


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}",
        "{{ messages.__class__.__base__.__subclasses__()[0].__init__.__globals__ }}",
    ],
)
def test_a_chat_template_cannot_reach_python(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, escape: str
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(write_toy(tmp_path))
    template = tmp_path / "backbone" / "chat_template.jinja"
    assert template.is_file()
    template.write_text(escape.replace("MARK", str(marker)))
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_command(train_command.main, [recipe, "--show-examples", "1"]) == 2
    assert not marker.exists()


# Secrets.

SECRETS = {
    name: f"top-secret-{number}"
    for number, name in enumerate(
        ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY")
    )
}


def test_no_secret_of_the_environment_is_written_or_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    recipe = str(write_toy(tmp_path))
    with caplog.at_level(logging.DEBUG, logger="secura_ds"):
        assert run_command(train_command.main, [recipe, "--set", 'training.report_to=["tensorboard"]']) == 0
        assert run_command(train_command.main, [recipe]) == 2
        assert run_command(train_command.main, [recipe, "--set", "backbone.model=no/such-model"]) == 2
        assert run_command(evaluate_command.main, [recipe]) == 2
        merged = ["--base", "backbone", "--adapter", "run/adapter", "--out", "merged", "--quiet"]
        assert run_command(merge_command.main, merged) == 0
        assert run_command(report_command.main, ["run"]) == 0
    said = "".join(capsys.readouterr()) + caplog.text
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 25 and any(path.name == "report.html" for path in written)
    for secret in SECRETS.values():
        assert secret not in said
        assert not [path for path in written if secret.encode() in path.read_bytes()]


def test_what_a_save_writes_is_safetensors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(write_toy(tmp_path))
    options = ["training.save_steps=4", "training.save_merged=true", "adapter.strategy=M1"]
    assert run_command(train_command.main, [recipe, *(w for o in options for w in ("--set", o))]) == 0
    suffixes = {path.suffix for path in Path("run").rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".jinja", ".md"}, suffixes
    for path in Path("run").rglob("*.safetensors"):
        tensors = load_file(path)
        save_file(tensors, tmp_path / "again.safetensors")
        assert tensors


def test_the_environment_of_a_job_is_not_printed() -> None:
    for path in (REPOSITORY / "launch").rglob("*.s*"):
        text = path.read_text()
        assert "set -x" not in text and "printenv" not in text
        assert subprocess.run(["grep", "-nE", r"^ *(env|export -p)$", str(path)], check=False).returncode == 1

"""`launch/evaluate.py` as a user calls it: backbone, adapter on it, merged checkpoint, and bad input."""

from __future__ import annotations

import json
import os
import runpy
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from evaluation_toys import byte_tokenizer, toy_model, write_jsonl
from peft import get_peft_model

from secura_ds import SecuraConfig
from secura_ds.adapter import save_adapter
from secura_ds.errors import run_command
from secura_ds.evaluation import runner
from secura_ds.stopping import exit_status

COMMAND = Path(__file__).parents[2] / "launch" / "evaluate.py"


@pytest.fixture(scope="module")
def command() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(COMMAND), run_name="evaluate_command"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    for name, seed in (("backbone", 0), ("other", 1)):
        toy_model(seed).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    write_jsonl(folder / "task.jsonl", [{"prompt": f"{i}", "completion": f"{i}!"} for i in range(5)])
    (folder / "text.txt").write_text("A short text. " * 20)
    content = {
        "name": "toy",
        "backbone": {"model": "backbone", "dtype": "float32"},
        "adapter": {"method": "secura", "cur_rank": 4, "inner_rank": 6, "selection": "least"},
        "data": {"sources": [{"path": "task.jsonl"}]},
        "training": {"output_dir": str(folder / "run"), "learning_rate": 0.001, "max_steps": 1},
        "evaluation": {
            "task": {"path": "task.jsonl", "metric": "exact_match", "max_new_tokens": 4},
            "probes": [{"kind": "text_loss", "path": "text.txt"}],
        },
    }
    (folder / "recipe.json").write_text(json.dumps(content))
    return folder / "recipe.json"


def run(command: SimpleNamespace, recipe: Path, *more: object) -> int:
    return run_command(command.main, [str(recipe), "--quiet", *map(str, more)])


def loss(path: Path) -> float:
    return float(json.loads(path.read_text())["probes"]["text"]["mean_token_loss"])


def test_backbone_adapter_and_checkpoint_are_told_apart(
    command: SimpleNamespace, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = get_peft_model(
        toy_model(), SecuraConfig(cur_rank=4, inner_rank=6, target_modules=["q_proj", "v_proj"])
    )
    for name, parameter in model.named_parameters():
        if "secura_B" in name:
            parameter.data.normal_(0.0, 0.5)
    save_adapter(model, tmp_path / "adapter")
    outs = {name: tmp_path / f"{name}.json" for name in ("base", "adapter", "other", "same")}
    assert run(command, recipe, "--out", outs["base"]) == 0
    assert run(command, recipe, "--out", outs["adapter"], "--adapter", tmp_path / "adapter") == 0
    assert run(command, recipe, "--out", outs["other"], "--model", recipe.parent / "other") == 0
    assert run(command, recipe, "--out", outs["same"], "--model", recipe.parent / "backbone") == 0
    losses = {name: loss(path) for name, path in outs.items()}
    assert losses["base"] == losses["same"]
    assert len({round(value, 4) for value in losses.values()}) == 3
    document = json.loads(outs["base"].read_text())
    assert (document["recipe"], document["task"]["n"]) == ("toy", 5)
    printed = capsys.readouterr().out
    assert f"written: {outs['base']}" in printed
    assert "Task: exact match" in printed and f"{losses['base']:.3f}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "--model nowhere holds no config.json"),
        (["--adapter", "nowhere"], "--adapter nowhere holds no adapter_config.json"),
        (["--set", "evaluation.task=null", "--set", "evaluation.probes=[]"], "has nothing to evaluate"),
        (["--set", "evaluation.task.metric=blue"], "evaluation.task.metric"),
        (["--out", "/"], "/ cannot be written"),
        (["--out", "/dev/null/a.json"], "/dev/null/a.json cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    command: SimpleNamespace,
    recipe: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(command, recipe, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_an_interrupted_evaluation_goes_on_after_what_was_finished(
    command: SimpleNamespace,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    status: int,
) -> None:
    whole, out, kept = tmp_path / "whole.json", tmp_path / "out.json", tmp_path / ".out.json.partial"
    assert run(command, recipe, "--out", whole) == 0
    scored: list[str] = []

    def score(*arguments: Any, **more: Any) -> Any:
        scored.append("task")
        return score_task(*arguments, **more)

    def interrupted(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), number)

    score_task = runner.score_task
    monkeypatch.setattr(runner, "score_task", score)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "text_loss", interrupted)
        assert run(command, recipe, "--out", out) == exit_status(number)
    assert not out.exists() and kept.is_file()
    assert run(command, recipe, "--out", out) == 0
    assert scored == ["task"] and not kept.exists()
    assert json.loads(out.read_text()) == json.loads(whole.read_text())


def test_parts_of_another_model_are_not_used(
    command: SimpleNamespace, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    with monkeypatch.context() as patch:
        patch.setattr(runner, "text_loss", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        assert run(command, recipe, "--out", out) == 75
    other = recipe.parent / "other"
    assert run(command, recipe, "--out", out, "--model", other) == 0
    assert run(command, recipe, "--out", tmp_path / "fresh.json", "--model", other) == 0
    assert json.loads(out.read_text()) == json.loads((tmp_path / "fresh.json").read_text())

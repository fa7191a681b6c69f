"""Credentials in URLs reach no file, no output and no error."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from training_toys import toy_recipe, write_toy

from launch import evaluate, merge, report, train
from secura_ds.errors import first_line, redacted, run_command, shown

SECRET = "S3CR3T-4f1b"
URL = f"https://someone:{SECRET}@example.org/x"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    (folder / "probe.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 0}\n')
    settings = toy_recipe() | {
        "evaluation": {"probes": [{"kind": "multiple_choice", "path": "probe.jsonl"}]},
        "description": f"made of {URL} and more",
    }
    settings["training"] |= {"max_steps": 2, "save_steps": 1, "report_to": ["tensorboard"]}
    (folder / "recipe.json").write_text(json.dumps(settings))
    return folder


def _run(command: ModuleType, *arguments: object) -> int:
    return run_command(command.main, [str(argument) for argument in arguments])


def test_secrets_reach_no_file_and_no_output(
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", URL)
    run, recipe = tmp_path / "run", toy / "recipe.json"
    assert _run(train, recipe, "--set", f"training.output_dir={run}") == 0
    assert _run(evaluate, recipe, "--out", run / "evaluation.before.json", "--quiet") == 0
    into = ("--base", toy / "backbone", "--adapter", run / "adapter", "--out", run / "merged", "--quiet")
    assert _run(merge, *into) == 0
    assert _run(report, run) == 0
    files = [path for path in run.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"recipe.resolved.json", "environment.json", "run.json", "report.html", "merge.json"} <= names
    assert any("tfevents" in name for name in names)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    captured = capfd.readouterr()
    assert SECRET not in captured.out + captured.err + caplog.text
    written = json.loads((run / "recipe.resolved.json").read_text())
    assert written["description"] == "made of https://***@example.org/x and more"


@pytest.mark.parametrize(
    "setting",
    [
        f"data.sources.0.path={URL}",
        f'data.sources=[{{"hub": "{URL}"}}]',
        f"training.output_dir={URL}",
        f"backbone.model={URL}",
        f"backbone.revision={URL}",
        f"training.deepspeed={URL}",
        f"evaluation.task.path={URL}",
        f"{URL}=1",
        URL,
    ],
)
def test_secrets_reach_no_error(toy: Path, capfd: pytest.CaptureFixture[str], setting: str) -> None:
    assert _run(evaluate, toy / "recipe.json", "--set", setting) == 2
    captured = capfd.readouterr()
    assert SECRET not in captured.out + captured.err and "***@" in captured.err


def test_what_is_redacted() -> None:
    assert redacted(f"see {URL}, s3://a:b@c and me@example.org at 10:30") == (
        "see https://***@example.org/x, s3://***@c and me@example.org at 10:30"
    )
    assert redacted("https://a:p@ss@host/x@y") == "https://***@host/x@y"
    assert redacted("https:/a:b@host/x") == "https:/***@host/x"
    assert first_line(ValueError(f"\n{URL}\nmore")) == "https://***@example.org/x"
    assert shown("a\nb\x1b[2J" + "c" * 100, 20) == "a\\nb\\x1b[2Jcccccc..."

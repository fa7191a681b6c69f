"""launch/plan.py as a user calls it: the table, the document, the verdict, and what it refuses."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from training_toys import REPOSITORY, launch, quiet_environment, write_toy

from secura_ds.errors import run_command
from secura_ds.plan import Plan

pytestmark = pytest.mark.long

RECIPES = REPOSITORY / "recipes"


def call(*arguments: object, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(REPOSITORY / "launch" / "plan.py"), *map(str, arguments)]
    return subprocess.run(
        script, cwd=cwd, env=quiet_environment(), capture_output=True, text=True, timeout=200
    )


def test_a_large_model_on_enough_gpus(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done = call(RECIPES / "llama3-8b.json", "--gpus", 4, "--gpu-memory", 24, "--json", out)
    assert done.returncode == 0, done.stderr
    for words in (
        "frozen weights",
        "gathered layers",
        "checkpoint",
        "merged",
        "gather weights",
        "fits: needs",
    ):
        assert words in done.stdout
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    document: dict[str, Any] = json.loads(out.read_text())
    found = Plan.from_dict(document["plan"])
    assert (found.ranks, found.zero_stage, found.device) == (4, 3, "cuda")
    # A quarter of 8.03 billion weights of two bytes.
    assert found.parts["frozen_weights"] == pytest.approx(8_030_261_248 * 2 / 4, rel=1e-4)
    assert document["verdict"]["fits"] and document["changes"] == []
    assert document["communication_seconds"] > 0


def test_what_would_help_where_it_does_not_fit() -> None:
    settings = ["--set", "training.gradient_checkpointing=false", "--set", "training.micro_batch_size=8"]
    done = call(RECIPES / "llama3-8b.json", *settings, "--gpus", 2, "--gpu-memory", 12)
    assert done.returncode == 1, done.stderr
    assert "does not fit" in done.stdout
    advice = [line for line in done.stdout.splitlines() if "--set " in line or "twice the GPUs" in line]
    assert len(advice) == 3


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_every_entry_of_task_sequences_is_planned(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = runpy.run_path(str(REPOSITORY / "launch" / "plan.py"), run_name="plan_command")["main"]
    recipe, out = RECIPES / "continual" / "qwen2-7b-sixteen-tasks.json", tmp_path / "plan.json"
    given = [str(recipe), "--gpus", "4", "--gpu-memory", "24", "--json", str(out)]
    assert run_command(command, given) == 0
    entries = [entry["name"] for entry in json.loads(recipe.read_text())["entries"]]
    said = [
        line.removeprefix("entry ")
        for line in capfd.readouterr().out.splitlines()
        if line.startswith("entry ")
    ]
    planned = json.loads(out.read_text())["entries"]
    assert said == entries and list(planned) == entries
    assert all(one["verdict"]["fits"] for one in planned.values())
    assert run_command(command, [*given[:4], "2"]) == 1


def test_bad_input_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = runpy.run_path(str(REPOSITORY / "launch" / "plan.py"), run_name="plan_command")["main"]
    recipe = RECIPES / "qwen2-7b.json"
    unknown = tmp_path / "unknown.json"
    values = json.loads(recipe.read_text()) | {"name": "unknown"}
    values["backbone"]["model"] = "nobody/nothing"
    values["data"]["sources"][0]["path"] = str(RECIPES / "tasks" / "orders-train.jsonl")
    values["training"]["deepspeed"] = str(RECIPES / "deepspeed" / "zero3.json")
    values["evaluation"] = {}
    unknown.write_text(json.dumps(values))
    for arguments, words in [
        ((tmp_path / "absent.json",), ["absent.json", "no such file"]),
        ((recipe, "--gpus", 0), ["--gpus is 0", "at least 1"]),
        ((recipe, "--gpu-memory", 24), ["--gpu-memory", "without --gpus"]),
        ((recipe, "--gpus", 3, "--nodes", 2), ["--gpus is 3", "--nodes 2"]),
        ((unknown, "--gpus", 4), ["nobody/nothing"]),
        ((RECIPES / "qlora" / "qwen2-7b.json", "--gpus", 4), ["training.deepspeed is null", "--gpus 1"]),
    ]:
        assert run_command(command, [str(argument) for argument in arguments]) == 2
        said = capfd.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in said
        assert all(word in errors[0] for word in words), errors


def test_a_run_records_its_plan_and_is_refused_where_it_cannot_fit(tmp_path: Path) -> None:
    recipe = write_toy(tmp_path)
    done = launch(recipe, "--set=training.max_steps=1")
    assert done.returncode == 0, done.stderr
    assert "planned memory per rank" in done.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert 0 < run["planned_memory_bytes"] < run["peak_memory_bytes"]  # a process holds its libraries, too
    huge = [
        "--set=training.micro_batch_size=40",
        "--set=training.gradient_accumulation_steps=1",
        "--set=data.max_length=64",
        "--set=training.output_dir=huge",
    ]
    wide = json.loads((tmp_path / "backbone" / "config.json").read_text()) | {"num_hidden_layers": 40}
    wide |= {"intermediate_size": 20_000_000, "layer_types": None}
    (tmp_path / "backbone" / "config.json").write_text(json.dumps(wide))
    done = launch(recipe, *huge)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for words in ("memory is short", "GiB of it activations", "gradient_checkpointing=true", '"warn"'):
        assert words in line
    assert not (tmp_path / "huge").exists()

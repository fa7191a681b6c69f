"""What users get wrong, command by command: one clear `error:` line, exit status 2, and nothing lost."""

from __future__ import annotations

import errno
import json
import runpy
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from fake_run import make_run
from safetensors.torch import load_file, save_file
from training_toys import PAPER, toy_recipe, write_toy
from transformers import LlamaForCausalLM

from secura_ds import files
from secura_ds.errors import run_command
from secura_ds.training.trainer import Trainer

LAUNCH = Path(__file__).parents[2] / "launch"
Run = Callable[..., str]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, data, a recipe, probes, and one finished run of three steps in `finished/`."""
    folder = tmp_path_factory.mktemp("toy")
    recipe = write_toy(folder)
    (folder / "probe.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 0}\n')
    settings = toy_recipe()
    settings["training"] |= {"output_dir": str(folder / "finished"), "max_steps": 3, "save_steps": 1}
    recipe.write_text(json.dumps(settings))
    assert _call("train", recipe) == 0
    return folder


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is no folder is looked for on the hub, which answers at once where there is none."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def recipe(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Writes a recipe beside the toy backbone, changed at `a__b` keys; the run goes into an empty folder."""
    monkeypatch.chdir(tmp_path)
    path = toy / "bad.json"

    def write(**changes: Any) -> Path:
        settings = deepcopy(toy_recipe())
        settings["training"] |= {"max_steps": 3}
        for key, value in changes.items():
            *sections, last = key.split("__")
            target = settings
            for section in sections:
                target = target.setdefault(section, {})
            target[last] = value
        path.write_text(json.dumps(settings))
        return path

    yield write
    path.unlink(missing_ok=True)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must fail and returns what follows `error: `, its last lines on stderr."""

    def run(command: str, *arguments: object) -> str:
        capfd.readouterr()
        status = _call(command, *arguments)
        captured = capfd.readouterr().err
        assert status == 2, captured
        assert "Traceback" not in captured and captured.count("error: ") == 1
        return captured.split("error: ")[1].rstrip("\n")

    return run


def _call(command: str, *arguments: object) -> int:
    module = runpy.run_path(str(LAUNCH / f"{command}.py"), run_name=f"{command}_command")
    return run_command(module["main"], [str(argument) for argument in arguments])


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# What the recipe says about itself: nothing is loaded, nothing is written.

RECIPE_PROBLEMS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("misspelt key", {"training__learning_rte": 1e-3}, ["training.learning_rte", "learning_rate"]),
    ("unknown section", {"adaptor": {}}, ["adaptor", "adapter"]),
    ("wrong type", {"training__micro_batch_size": "two"}, ["training.micro_batch_size", "two"]),
    ("value not allowed", {"adapter__strategy": "M3"}, ["adapter.strategy", "M3", "M1"]),
    ("missing data", {"data__sources": [{"path": "absent.jsonl"}]}, ["data.sources", "absent.jsonl"]),
    (
        "missing probe",
        {"evaluation__probes": [{"kind": "text_loss", "path": "absent.txt"}]},
        ["evaluation.probes", "absent.txt"],
    ),
    (
        "M1 in 4 bits",
        {"backbone__quantization": {"kind": "nf4"}, "backbone__dtype": "bfloat16", "adapter__strategy": "M1"},
        ["M1", "M2"],
    ),
    ("steps and epochs", {"training__epochs": 1}, ["max_steps", "epochs"]),
    ("both eps", {"adapter__smagnorm": {"eps": 1e-9, "eps_relative": 1.0}}, ["eps", "eps_relative"]),
]


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("changes", "words"), [p[1:] for p in RECIPE_PROBLEMS], ids=[p[0] for p in RECIPE_PROBLEMS]
)
def test_a_bad_recipe_writes_nothing(
    recipe: Callable[..., Path],
    refused: Run,
    tmp_path: Path,
    command: str,
    changes: dict[str, Any],
    words: list[str],
) -> None:
    message = refused(command, recipe(**changes))
    assert all(word in message for word in ["bad.json", *words]), message
    assert list(tmp_path.iterdir()) == []


def test_all_problems_of_a_recipe_are_told_at_once(recipe: Callable[..., Path], refused: Run) -> None:
    message = refused("train", recipe(training__learning_rte=1, adapter__cur_rank="x", data__max_length=-1))
    assert all(word in message for word in ("learning_rte", "adapter.cur_rank", "data.max_length"))


def test_overrides_are_checked_like_the_file(recipe: Callable[..., Path], refused: Run) -> None:
    assert "learning_rte" in refused("train", recipe(), "--set", "training.learning_rte=1")
    assert "micro_batch_size" in refused("train", recipe(), "--set", "training.micro_batch_size=two")


def test_a_recipe_that_is_no_recipe(toy: Path, refused: Run, tmp_path: Path) -> None:
    assert "absent.json" in refused("train", toy / "absent.json")
    (tmp_path / "torn.json").write_text('{"name": "x",')
    assert "torn.json" in refused("train", tmp_path / "torn.json")


# Data.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["odd.jsonl", "no rows"]),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', ["odd.jsonl:2", "not JSON"]),
        ('{"prompt": "a", "completion": "b"}\n[1]\n', ["odd.jsonl:2", "object"]),
        ('{"question": "a", "solution": "b"}\n', ["odd.jsonl"]),
    ],
    ids=["empty", "malformed", "no object", "unknown fields"],
)
def test_bad_data_names_file_and_line(
    recipe: Callable[..., Path], refused: Run, toy: Path, tmp_path: Path, text: str, words: list[str]
) -> None:
    (toy / "odd.jsonl").write_text(text)
    message = refused("train", recipe(data__sources=[{"path": "odd.jsonl"}]))
    assert "\n" not in message and all(word in message for word in words), message
    _assert_free_for_a_new_run(tmp_path / "run")


def test_examples_without_a_token_to_learn_are_counted(
    recipe: Callable[..., Path], toy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "word " * (40 if i < 3 else 1), "completion": "yes"} for i in range(10)]
    (toy / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = recipe(data__sources=[{"path": "odd.jsonl"}])
    assert _call("train", path, "--show-examples", 1) == 0
    assert "10 read, 7 used, 3 dropped (cut to max_length" in capfd.readouterr().out


def test_no_example_left_is_an_error(recipe: Callable[..., Path], refused: Run, tmp_path: Path) -> None:
    message = refused("train", recipe(data__max_length=8))
    assert "max_length" in message and "8" in message and "\n" not in message
    _assert_free_for_a_new_run(tmp_path / "run")


def test_fewer_rows_than_a_step_takes(
    recipe: Callable[..., Path], refused: Run, toy: Path, tmp_path: Path
) -> None:
    """The sampler would repeat examples to give every pass one; the folder is free for the mended run."""
    rows = (toy / "rows.jsonl").read_text().splitlines(keepends=True)
    (toy / "odd.jsonl").write_text("".join(rows[:3]))
    message = refused("train", recipe(data__sources=[{"path": "odd.jsonl"}]))
    assert "there are 3 rows" in message and "2 x 2 x 1 = 4" in message and "\n" not in message
    _assert_free_for_a_new_run(tmp_path / "run")


# Recipe against backbone.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter__cur_rank": 4096}, ["cur_rank", "4096", "layers.0", "at most"]),
        ({"adapter__inner_rank": 4096}, ["inner_rank", "4096", "layers.0", "at most"]),
        ({"adapter__target_modules": ["query_projection"]}, ["adapter.target_modules", "query_projection"]),
        ({"backbone__model": "nowhere"}, ["nowhere"]),
        ({"backbone__model": "embedded:none"}, ["none"]),
    ],
    ids=["cur_rank", "inner_rank", "no target", "no model", "no embedded model"],
)
def test_a_recipe_that_does_not_fit_the_backbone(
    recipe: Callable[..., Path], refused: Run, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    message = refused("train", recipe(**changes))
    assert "\n" not in message and all(word in message for word in words), message
    _assert_free_for_a_new_run(tmp_path / "run")


def test_an_adapter_on_a_tied_head(
    recipe: Callable[..., Path], refused: Run, toy: Path, tmp_path: Path
) -> None:
    tied = toy / "tied"
    shutil.copytree(toy / "backbone", tied, dirs_exist_ok=True)
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    message = refused("train", recipe(backbone__model="tied", adapter__target_modules=["q_proj", "lm_head"]))
    assert "lm_head" in message and "shares one weight" in message and "\n" not in message
    _assert_free_for_a_new_run(tmp_path / "run")


@pytest.mark.parametrize("method", [PAPER | {"cur_rank": 7, "inner_rank": 9}, {"method": "lora", "rank": 3}])
def test_an_adapter_on_an_untied_head(
    recipe: Callable[..., Path], refused: Run, tmp_path: Path, method: dict[str, Any]
) -> None:
    path = recipe(adapter=method | {"target_modules": ["q_proj", "lm_head"]})
    message = refused("train", path)
    assert "head lm_head" in message and "adapter.modules_to_save" in message and "\n" not in message
    _assert_free_for_a_new_run(tmp_path / "run")


@pytest.mark.parametrize("kept", [0, 6, 4000])
def test_a_truncated_backbone(
    recipe: Callable[..., Path], refused: Run, toy: Path, tmp_path: Path, kept: int
) -> None:
    broken = _cut(toy / "backbone", tmp_path / "broken", "model.safetensors", kept)
    for command in ("train", "evaluate"):
        probes = [{"kind": "multiple_choice", "path": "probe.jsonl"}]
        message = refused(command, recipe(backbone__model=str(broken), evaluation__probes=probes))
        assert "broken" in message and "\n" not in message
    _assert_free_for_a_new_run(tmp_path / "run")


# Folders.


def test_a_finished_run_is_not_overwritten_unasked(
    recipe: Callable[..., Path], refused: Run, toy: Path, tmp_path: Path
) -> None:
    shutil.copytree(toy / "finished", tmp_path / "run")
    before = _contents(tmp_path)
    message = refused("train", recipe())
    assert all(word in message for word in ("run", "--overwrite", "--resume")) and "\n" not in message
    assert _contents(tmp_path) == before
    assert "one of them" in refused("train", recipe(), "--resume", "--overwrite")
    assert _contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: {k: v + 0.05 for k, v in tensors.items()}, ["are not those", "q_proj"]),
        (None, ["do not fit this adapter"]),
    ],
    ids=["other values", "other shapes"],
)
def test_a_run_is_not_continued_on_other_weights_of_the_same_name(
    recipe: Callable[..., Path], refused: Run, toy: Path, tmp_path: Path, change: Any, words: list[str]
) -> None:
    base = shutil.copytree(toy / "backbone", tmp_path / "base")
    path = recipe(backbone__model=str(base), training__save_steps=1, training__max_steps=2)
    assert _call("train", path) == 0
    before = _contents(tmp_path / "run")
    if change is not None:
        shutil.rmtree(base)
        _other(toy, base, change)
    else:
        config = LlamaForCausalLM.from_pretrained(base).config
        config.hidden_size = 128
        LlamaForCausalLM(config).save_pretrained(base)
    path = recipe(backbone__model=str(base), training__save_steps=1, training__max_steps=4)
    message = refused("train", path, "--resume")
    assert all(word in message for word in (*words, "--overwrite")) and "\n" not in message
    assert _contents(tmp_path / "run") == before


def test_overwrite_deletes_nothing_when_the_new_run_cannot_start(
    recipe: Callable[..., Path], refused: Run, toy: Path, tmp_path: Path
) -> None:
    shutil.copytree(toy / "finished", tmp_path / "run")
    before = _contents(tmp_path / "run")
    (toy / "odd.jsonl").write_text("not JSON\n")
    assert "odd.jsonl:1" in refused("train", recipe(data__sources=[{"path": "odd.jsonl"}]), "--overwrite")
    assert "cur_rank is 100000" in refused("train", recipe(adapter__cur_rank=100000), "--overwrite")
    after = _contents(tmp_path / "run")
    assert {name for name in before if after.get(name) != before[name]} == set()


def test_another_recipe_does_not_resume_a_run(
    recipe: Callable[..., Path], refused: Run, toy: Path, tmp_path: Path
) -> None:
    shutil.copytree(toy / "finished", tmp_path / "run")
    before = _contents(tmp_path)
    message = refused("train", recipe(adapter__cur_rank=5, training__save_steps=1), "--resume")
    assert "adapter.cur_rank" in message and "\n" not in message
    shutil.copytree(toy / "backbone", tmp_path / "another")
    other = recipe(backbone__model=str(tmp_path / "another"), training__save_steps=1)
    message = refused("train", other, "--resume")
    assert "backbone.model" in message and "another" in message and "\n" not in message
    shutil.rmtree(tmp_path / "another")
    assert _contents(tmp_path) == before


# While training.


def test_a_full_disk_keeps_what_was_saved(
    recipe: Callable[..., Path], refused: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[str] = []
    save_file_for_real = files.save_file

    def save_or_fail(tensors: Any, path: str, **options: Any) -> None:
        saved.append(path)
        if len([name for name in saved if "optimizer" in name]) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file_for_real(tensors, path, **options)

    monkeypatch.setattr(files, "save_file", save_or_fail)
    message = refused("train", recipe(training__save_steps=1))
    assert "is full" in message and "\n" not in message
    monkeypatch.undo()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in sorted(checkpoints.glob("step-*"))] == ["step-000001"]
    assert not (tmp_path / "run" / "adapter").exists()
    monkeypatch.chdir(tmp_path)
    assert _call("train", recipe(training__save_steps=1), "--resume") == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_loss_that_is_not_finite_stops_the_run(
    recipe: Callable[..., Path], refused: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, calls = Trainer.compute_loss, [0]

    def broken(self: Trainer, *arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        loss = compute(self, *arguments, **options)
        return loss * float("nan") if calls[0] > 4 else loss  # two forward passes a step: from step 3 on

    monkeypatch.setattr(Trainer, "compute_loss", broken)
    message = refused("train", recipe(training__save_steps=1, training__max_steps=20))
    assert (
        all(word in message for word in ("not finite", "learning_rate", "step-000002"))
        and "\n" not in message
    )
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text())["status"] == "stopped"
    assert [path.name for path in sorted((run / "checkpoints").glob("step-*"))][-1] == "step-000002"
    trained = load_file(run / "checkpoints" / "step-000002" / "trained.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in trained.values())
    assert not (run / "adapter").exists()


# Merge, evaluation and report.


def _other(
    toy: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Path:
    shutil.copytree(toy / "backbone", folder)
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


def test_base_and_adapter_that_do_not_belong_together(toy: Path, refused: Run, tmp_path: Path) -> None:
    adapter = toy / "finished" / "adapter"
    moved = _other(toy, tmp_path / "moved", lambda tensors: {k: v + 0.01 for k, v in tensors.items()})
    wide = tmp_path / "wide"
    model = LlamaForCausalLM.from_pretrained(toy / "backbone")
    model.config.hidden_size = 128
    LlamaForCausalLM(model.config).save_pretrained(wide)
    for base in (moved, wide):
        message = refused("merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--quiet")
        assert "trained on" in message and "\n" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved", "wide"]


@pytest.mark.parametrize("kept", [0, 6, 4000])
def test_truncated_files_in_a_merge(toy: Path, refused: Run, tmp_path: Path, kept: int) -> None:
    base, adapter = toy / "backbone", toy / "finished" / "adapter"
    cut_base = _cut(base, tmp_path / "base", "model.safetensors", kept)
    cut_adapter = _cut(adapter, tmp_path / "adapter", "adapter_model.safetensors", kept)
    for one, other in ((cut_base, adapter), (base, cut_adapter)):
        message = refused("merge", "--base", one, "--adapter", other, "--out", tmp_path / "out", "--quiet")
        assert "truncated" in message and "safetensors" in message and "\n" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_merge_replaces_nothing_unasked(toy: Path, refused: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    arguments = (
        "--base",
        toy / "backbone",
        "--adapter",
        toy / "finished" / "adapter",
        "--out",
        tmp_path / "out",
    )
    assert "--overwrite" in refused("merge", *arguments, "--quiet")
    assert _contents(tmp_path) == {"out/mine.txt": b"kept"}


def test_an_evaluation_on_bad_items_names_the_row(
    recipe: Callable[..., Path], refused: Run, toy: Path, tmp_path: Path
) -> None:
    for text, words in (
        ('{"question": "q", "choices": ["a", "b"], "answer": 0}\n{"question": \n', "odd.jsonl:2"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}\n', "answer is 2"),
        ("", "no rows"),
    ):
        (toy / "odd.jsonl").write_text(text)
        path = recipe(evaluation__probes=[{"kind": "multiple_choice", "path": "odd.jsonl"}])
        message = refused("evaluate", path, "--out", tmp_path / "scores.json", "--quiet")
        assert "odd.jsonl" in message and words in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_of_the_wrong_things(
    recipe: Callable[..., Path], refused: Run, toy: Path, tmp_path: Path
) -> None:
    probes = [{"kind": "multiple_choice", "path": "probe.jsonl"}]
    out = tmp_path / "scores.json"
    assert "evaluation" in refused("evaluate", recipe(), "--out", out)
    path = recipe(evaluation__probes=probes)
    assert "config.json" in refused("evaluate", path, "--model", tmp_path, "--out", out)
    assert "adapter_config.json" in refused("evaluate", path, "--adapter", tmp_path, "--out", out)
    cut = _cut(toy / "finished" / "adapter", tmp_path / "cut", "adapter_model.safetensors", 4000)
    message = refused("evaluate", path, "--adapter", cut, "--out", out)
    assert "cut" in message and "\n" not in message
    moved = _other(toy, tmp_path / "moved", lambda tensors: {k: v + 0.01 for k, v in tensors.items()})
    path = recipe(evaluation__probes=probes, backbone__model=str(moved))
    message = refused("evaluate", path, "--adapter", toy / "finished" / "adapter", "--out", out)
    assert "does not belong to this base model" in message and "\n" not in message
    assert not out.exists()


def test_a_report_on_no_run(refused: Run, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=2, blocks=1)
    before = _contents(tmp_path)
    assert "no run folder" in refused("report", tmp_path)
    assert "is no folder" in refused("report", tmp_path / "absent")
    assert "given twice" in refused("report", folder, folder)
    assert _contents(tmp_path) == before


def _cut(folder: Path, target: Path, name: str, kept: int) -> Path:
    """A copy of `folder` whose file `name` ends after `kept` bytes."""
    shutil.copytree(folder, target)
    (target / name).write_bytes((folder / name).read_bytes()[:kept])
    return target


def _assert_free_for_a_new_run(folder: Path) -> None:
    """Nothing that looks like a run is left, so the mended recipe starts without any flag."""
    left = {path.name for path in folder.iterdir()} if folder.exists() else set()
    assert left <= {"recipe.resolved.json", "environment.json"}

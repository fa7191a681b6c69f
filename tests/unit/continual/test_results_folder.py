"""The results folder of task sequences: what goes on in it after accidents, moves and other recipes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from continual_toys import load, results, sequence_recipe, write_sequence_toy
from training_toys import PAPER, write_toy

from secura_ds.continual import SequencesSummary, run_sequences
from secura_ds.continual import measure as measuring
from secura_ds.errors import UserError
from secura_ds.recipe import load_recipe
from secura_ds.report import write_report
from secura_ds.training import callbacks
from secura_ds.training import run as runs
from secura_ds.training.trainer import Trainer

LORA = {"method": "lora", "rank": 3, "target_modules": ["q_proj"]}
ENTRY = {"name": "lora", "adapter": LORA, "learning_rates": [0.01]}
FOLDER = "sequences/lora-lr0.01-order1-seed0"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sequence of two tasks."""
    folder = tmp_path_factory.mktemp("done")
    write_sequence_toy(folder, entries=[ENTRY], tasks=["sums", "sizes"])
    assert run_sequences(load(folder)).finished == 1
    return folder


@pytest.fixture
def moved(done: Path, tmp_path: Path) -> Path:
    """The same, backbone and all, in another place."""
    shutil.copytree(done, tmp_path / "moved")
    return tmp_path / "moved"


def scores(folder: Path) -> Any:
    return [{k: v for k, v in s.items() if k != "train"} for s in results(folder)["sequences"][0]["stages"]]


def broken_at(rate: float, monkeypatch: pytest.MonkeyPatch, *, gradient: bool) -> None:
    """Losses, or gradients alone, are not finite at a learning rate."""
    compute = Trainer.compute_loss

    def broken(trainer: Trainer, *args: Any, **more: Any) -> Any:
        loss = compute(trainer, *args, **more)
        if trainer.args.learning_rate != rate:
            return loss
        if gradient:
            loss.register_hook(lambda value: value * float("nan"))
            return loss
        return loss * float("nan")

    monkeypatch.setattr(Trainer, "compute_loss", broken)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_sequence_that_diverges_does_not_end_the_others(
    gradient: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its loss, or by parameters that are not finite when they are to be saved."""
    write_sequence_toy(tmp_path, entries=[ENTRY | {"learning_rates": [0.02, 0.01]}], tasks=["sums", "sizes"])
    longer = load(tmp_path, f"training.max_steps={3 if gradient else 6}")
    broken_at(0.02, monkeypatch, gradient=gradient)
    assert run_sequences(longer) == SequencesSummary(planned=2, finished=1, diverged=1)
    first, second = results(tmp_path)["sequences"]
    assert first["status"] == "diverged" and first["metrics"] is None
    assert second["status"] == "finished"
    assert run_sequences(longer, resume=True) == SequencesSummary(planned=2, finished=1, diverged=1)
    mark = tmp_path / "results" / "sequences" / "lora-lr0.02-order1-seed0" / "diverged.json"
    assert "not finite" in json.loads(mark.read_text())["reason"]
    page = write_report([tmp_path / "results"]).read_text(encoding="utf-8")
    assert "lora-lr0.02-order1-seed0 has diverged (0 of 2 tasks)" in page


def test_a_measurement_without_a_number_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model may be finite and its loss not."""
    measured = measuring._loss

    def overflowing(model: Any, tokenizer: Any, recipe: Any, path: Path) -> dict[str, Any]:
        found = measured(model, tokenizer, recipe, path)
        return found | {"loss": float("nan")} if path.name.startswith("sums.held-out") else found

    monkeypatch.setattr(measuring, "_loss", overflowing)
    write_sequence_toy(tmp_path, entries=[ENTRY], tasks=["sums", "sizes"])
    assert run_sequences(load(tmp_path)).finished == 1
    stage = results(tmp_path)["sequences"][0]["stages"][0]
    assert stage["tasks"]["sums"]["loss"] is None and stage["tasks"]["sizes"]["loss"] > 0
    assert write_report([tmp_path / "results"]).is_file()


def test_a_folder_that_was_moved_goes_on(moved: Path, done: Path) -> None:
    shutil.rmtree(moved / "results" / FOLDER / "stages" / "02-sizes")
    (moved / "results" / FOLDER / "scores" / "02-sizes.json").unlink()
    with pytest.raises(UserError, match="has no whole checkpoint to go on from"):
        run_sequences(load(moved), resume=True)  # it was tidied; but nothing is said of another backbone
    shutil.rmtree(moved / "results" / FOLDER)
    assert run_sequences(load(moved), resume=True).finished == 1
    assert scores(moved) == scores(done)


def test_another_backbone_beside_a_moved_folder_is_noticed(moved: Path) -> None:
    shutil.copytree(moved / "backbone", moved / "other")
    with pytest.raises(UserError, match=r"--resume: backbone\.model is .*other"):
        run_sequences(load(moved, f"backbone.model={moved / 'other'}"), resume=True)


def test_a_task_that_was_interrupted_goes_on_where_its_folder_was_moved(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sequence_toy(tmp_path / "a", entries=[ENTRY], tasks=["sums", "sizes"])
    on_step, steps = callbacks.Agreement.on_step_end, []

    def step(agreement: Any, *args: Any, **more: Any) -> None:
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        on_step(agreement, *args, **more)

    monkeypatch.setattr(callbacks.Agreement, "on_step_end", step)
    assert run_sequences(load(tmp_path / "a")).signal == signal.SIGTERM
    (tmp_path / "a").rename(tmp_path / "b")
    assert run_sequences(load(tmp_path / "b"), resume=True).finished == 1
    assert scores(tmp_path / "b") == scores(done)


def test_an_entry_that_comes_back_changed_is_noticed(moved: Path) -> None:
    values = json.loads((moved / "sequences.json").read_text())
    other = ENTRY | {"name": "other"}
    (moved / "sequences.json").write_text(json.dumps(values | {"entries": [other]}))
    assert run_sequences(load(moved), resume=True).finished == 1
    larger = ENTRY | {"adapter": LORA | {"rank": 4}}
    (moved / "sequences.json").write_text(json.dumps(values | {"entries": [other, larger]}))
    with pytest.raises(UserError, match=r'--resume: entry lora: adapter is .*"rank": 4.* were started with'):
        run_sequences(load(moved), resume=True)


def test_files_of_an_entry_may_move_with_the_folder_more_than_once(tmp_path: Path) -> None:
    adapter = PAPER | {"cur_rank": 5, "inner_rank": 6, "selection": "calibrated"}
    adapter["calibration"] = {"mode": "null", "text": "own.txt", "num_tokens": 160}
    first = tmp_path / "a"
    write_sequence_toy(first, entries=[ENTRY | {"adapter": adapter}], tasks=["sums", "sizes"])
    (first / "own.txt").write_text("the cat sat on the mat and then it left again. " * 30)
    assert run_sequences(load(first)).finished == 1
    for old, new in (("a", "b"), ("b", "c")):
        (tmp_path / old).rename(tmp_path / new)
        assert run_sequences(load(tmp_path / new), resume=True).finished == 1
    (tmp_path / "c" / "other.txt").write_text("another text altogether. " * 30)
    with pytest.raises(UserError, match=r"--resume: entry lora: adapter is .*other\.txt.* started with"):
        run_sequences(load(tmp_path / "c", 'entries.0.adapter.calibration.text="other.txt"'), resume=True)


def test_another_order_in_the_place_of_one_is_noticed(moved: Path) -> None:
    with pytest.raises(UserError, match=r'--resume: orders is \["sizes", "sums"\], but .* started with'):
        run_sequences(load(moved, 'orders=[["sizes","sums"]]'), resume=True)


def test_a_power_cut_before_the_record_of_a_run_costs_its_measurement_alone(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sequence_toy(tmp_path, entries=[ENTRY], tasks=["sums", "sizes"])
    write = runs.atomic_write_json

    def cut(path: Path, document: Any) -> None:
        if path.name == "run.json" and path.parent.name == "02-sizes":
            raise RuntimeError("power cut")
        write(path, document)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(runs, "atomic_write_json", cut)
        run_sequences(load(tmp_path))
    assert (tmp_path / "results" / FOLDER / "scores" / "02-sizes.json").is_file()
    assert run_sequences(load(tmp_path), resume=True).finished == 1
    assert scores(tmp_path) == scores(done)


def test_items_are_counted_where_they_hold_separators_of_lines(moved: Path) -> None:
    path = moved / "tasks" / "sums-test.jsonl"
    rows = path.read_text().splitlines()
    rows[0] = json.dumps({"prompt": "add 1 \u2028 and 1", "completion": "2"})
    path.write_text("\n".join(rows) + "\n")
    assert run_sequences(load(moved), overwrite=True).finished == 1
    assert results(moved)["tasks"][0]["items"] == len(rows)


def test_seconds_leave_out_measuring_and_hold_those_before_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_toy(tmp_path), [f"training.output_dir={tmp_path / 'run'}"])
    counters = Trainer.counters

    def with_an_hour(trainer: Trainer) -> dict[str, Any]:
        found = counters(trainer)
        return found | {"run_seconds": found["run_seconds"] + 3600}

    def measure(trainer: Trainer) -> None:
        time.sleep(3)
        os.kill(os.getpid(), signal.SIGTERM)

    began = time.perf_counter()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "counters", with_an_hour)
        first = runs.train(recipe, stage=runs.Stage(measure=measure))
    assert first.signal == signal.SIGTERM
    assert 0 < first.seconds < time.perf_counter() - began - 3
    resolved = json.loads((tmp_path / "run" / "recipe.resolved.json").read_text())
    assert resolved["training"]["output_dir"] == str(tmp_path / "run")
    again = runs.train(recipe, resume=True, stage=runs.Stage())
    assert 3600 < again.seconds < 3600 + time.perf_counter() - began - 3


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a peak is counted anew on Linux only")
def test_the_peak_of_memory_is_that_since_it_was_reset() -> None:
    much = torch.zeros(2**26)  # 256 MiB
    before = callbacks.peak_memory()
    del much
    callbacks.reset_peak_memory()
    assert callbacks.memory_in_use() <= callbacks.peak_memory() < before - 2**27


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"entries": [ENTRY, ENTRY | {"name": "b", "adapter": LORA | {"target_modules": ["query"]}}]},
            'entry b: adapter.target_modules has "query", which matches no module',
        ),
        (
            {
                "entries": [
                    {"name": "c", "adapter": {"method": "secura", "cur_rank": 999}, "learning_rates": [1]}
                ]
            },
            "entry c: .*cur_rank is 999",
        ),
        (
            {"training": sequence_recipe()["training"] | {"micro_batch_size": 40}},
            "there are 24 rows of the task sums, but a step takes 40 x 1 x 1 = 40",
        ),
    ],
)
def test_settings_that_fit_nothing_are_refused_before_anything_is_measured(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write_sequence_toy(tmp_path, **changes)
    with pytest.raises(UserError, match=said):
        run_sequences(load(tmp_path))
    assert not (tmp_path / "results").exists()


def test_a_bad_probe_is_named_where_the_user_has_it_and_leaves_nothing(tmp_path: Path) -> None:
    write_sequence_toy(tmp_path)
    probe = tmp_path / "knowledge.jsonl"
    whole = probe.read_text()
    probe.write_text(whole.replace('"answer": 0', '"answer": "a"', 1))
    with pytest.raises(UserError, match=rf"{probe}:1: answer is 'a'"):
        run_sequences(load(tmp_path))
    probe.write_text(whole)
    short = {"kind": "multiple_choice", "path": "knowledge.jsonl", "max_items": 50}
    with pytest.raises(UserError, match=rf"{probe}.* 9 questions"):
        run_sequences(load(tmp_path, f"evaluation.probes={json.dumps([short])}"))
    assert not (tmp_path / "results").exists()

"""Whole sequences on a toy: what they leave, that each task goes on from the last, and that they go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from continual_toys import CONTRAST, SECURA, TASKS, load, results, strategies, write_sequence_toy
from safetensors.torch import load_file, save_file
from training_toys import adapter, losses

from launch.continual import main
from secura_ds.adapter import load_adapter
from secura_ds.backbones import load_model, load_tokenizer
from secura_ds.continual import SequencesSummary, Share, run_sequences
from secura_ds.continual import measure as measuring
from secura_ds.errors import UserError
from secura_ds.evaluation import evaluate
from secura_ds.recipe import EvaluationRecipe, load_recipe
from secura_ds.training import callbacks, train

M1 = SECURA | {"strategy": "M1", "fold_every": 2}
LORA = {"method": "lora", "rank": 3, "target_modules": ["q_proj"]}
ENTRIES = [
    # A penalty strong enough to show in three steps.
    *(
        {"name": kind, "adapter": SECURA, "strategy": s | ({"penalty": 5e4} if s["kind"] == "ewc" else {})}
        for kind, s in strategies().items()
    ),
    {"name": "folded", "adapter": M1, "strategy": strategies()["er"]},
    {"name": "lora", "adapter": LORA, "strategy": strategies()["ewc"]},
    {"name": "contrast", "adapter": CONTRAST},
    {"name": "protect", "adapter": CONTRAST, "strategy": {"kind": "protect", "buffer_size": 6}},
]


def entry(name: str) -> dict[str, Any]:
    return next(e for e in ENTRIES if e["name"] == name) | {"learning_rates": [0.01]}


def timeless(value: Any) -> Any:
    """A document without what differs from run to run."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "peak_memory_bytes")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every strategy over the three tasks, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = load(folder, entries=[entry(e["name"]) for e in ENTRIES])
    assert run_sequences(recipe) == SequencesSummary(planned=9, finished=9, diverged=0)
    return folder


def test_every_task_and_probe_is_measured_before_and_after_each_task(whole: Path) -> None:
    found = results(whole)
    assert found["status"] == "finished"
    assert [task["name"] for task in found["tasks"]] == list(TASKS)
    assert [task["chance"] for task in found["tasks"]] == [0, 0, 0.5]
    assert [probe["name"] for probe in found["probes"]] == ["knowledge", "general"]
    assert set(found["before"]["tasks"]) == set(TASKS)
    for sequence in found["sequences"]:
        assert [stage["task"] for stage in sequence["stages"]] == list(TASKS)
        for stage in sequence["stages"]:
            assert set(stage["tasks"]) == set(TASKS) and set(stage["probes"]) == {"knowledge", "general"}
            assert all(value["loss"] > 0 and value["loss_stderr"] > 0 for value in stage["tasks"].values())
            assert stage["train"]["steps"] == 3 and stage["train"]["validation_loss"] > 0
        assert sequence["metrics"] is not None
    kept = {s["entry"]: s["buffer_examples"] for s in found["sequences"]}
    assert kept == {
        "seq": 0,
        "er": 6,
        "ewc": 0,
        "online": 0,
        "i-lora": 6,
        "folded": 6,
        "lora": 0,
        "contrast": 0,
        "protect": 6,
    }


def test_what_is_measured_is_what_the_saved_adapter_does(whole: Path) -> None:
    """For M1, whose weights have changed, and I-LoRA, whose long-term memory is kept, too."""
    recipe = load(whole)
    tokenizer = load_tokenizer(recipe.backbone)
    probes = EvaluationRecipe(probes=recipe.evaluation.probes)
    for sequence in results(whole)["sequences"]:
        stage = whole / "results" / sequence["folder"] / "stages" / "03-sizes"
        model = load_adapter(load_model(recipe.backbone), stage / "adapter")
        again = evaluate(model, tokenizer, probes, recipe.resolve_path, progress=False)["probes"]
        measured = sequence["stages"][-1]["probes"]
        assert measured["general"]["score"] == pytest.approx(again["general"]["mean_token_loss"], rel=1e-5)
        assert measured["general"]["score"] != results(whole)["before"]["probes"]["general"]["score"]


def test_a_task_goes_on_from_the_last_one(whole: Path) -> None:
    """Two tasks in a row are one run of both, but for the optimizer and the schedule, which begin anew."""
    stages = whole / "results" / "sequences" / "seq-lr0.01-order1-seed0" / "stages"
    first, second = adapter(stages / "01-sums"), adapter(stages / "02-names")
    moved = {name: float((second[name] - first[name]).abs().max()) for name in first if "_B" in name}
    # Adam moves a parameter by about the learning rate a step, 3 steps on a cosine here.
    assert all(0 < value < 3.5e-2 for value in moved.values())
    assert all(torch.equal(first[n], second[n]) for n in first if "_C" in n or "_R" in n)
    assert not list(stages.glob("*/checkpoints"))


def test_contrast_under_m1_takes_new_factors_for_each_task(whole: Path) -> None:
    """What was learnt before is in the weights alone, and the factors are those of the task at hand."""
    stages = whole / "results" / "sequences" / "contrast-lr0.01-order1-seed0" / "stages"
    first, second = adapter(stages / "01-sums"), adapter(stages / "02-names")
    assert all(not torch.equal(first[n], second[n]) for n in first if n.endswith(("_C", "_R", "_W")))
    assert all(torch.equal(first[n], second[n]) for n in first if n.endswith("_sample"))
    assert not any(value.any() for n, value in second.items() if n.endswith(("_B", "_U")))
    recipe = load(whole)
    base = load_model(recipe.backbone)
    for name in (n for n in first if n.endswith("_W")):
        W = base.get_submodule(name.removeprefix("base_model.model.").removesuffix(".secura_W")).weight
        first_change, second_change = first[name] - W, second[name] - first[name]
        assert first_change.any() and second_change.any()


def test_protection_chooses_other_factors_once_there_are_earlier_tasks(whole: Path) -> None:
    free, clear = (
        whole / "results" / "sequences" / f"{name}-lr0.01-order1-seed0" / "stages"
        for name in ("contrast", "protect")
    )
    first, second = ((adapter(free / task), adapter(clear / task)) for task in ("01-sums", "02-names"))
    assert all(torch.equal(value, first[1][name]) for name, value in first[0].items())
    chosen = [n for n in second[0] if n.endswith(("_C", "_R"))]
    assert chosen and all(not torch.equal(second[0][n], second[1][n]) for n in chosen)


def test_a_line_separator_in_an_example_does_not_end_it(tmp_path: Path) -> None:
    write_sequence_toy(tmp_path, entries=[entry("er")], orders=[["sums", "names"]])
    train = tmp_path / "tasks" / "sums-train.jsonl"
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    odd = [json.dumps(row | {"completion": "a\u2028b"}, ensure_ascii=False) for row in rows]
    train.write_text("".join(f"{line}\n" for line in odd), encoding="utf-8")
    assert run_sequences(load(tmp_path)).finished == 1
    (buffer,) = (tmp_path / "results/sequences").glob("*/strategy/02-names.buffer.jsonl")
    kept = [json.loads(line) for line in buffer.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [row["completion"] for row in kept] == ["a\u2028b"] * 6


def test_one_task_is_the_run_of_launch_train(whole: Path, tmp_path: Path) -> None:
    stage = whole / "results" / "sequences" / "seq-lr0.01-order1-seed0" / "stages" / "01-sums"
    recipe = load_recipe(stage / "recipe.resolved.json", [f"training.output_dir={tmp_path / 'run'}"])
    train(recipe)
    assert losses(tmp_path / "run") == losses(stage)
    expected = adapter(stage)
    assert all(torch.equal(value, expected[name]) for name, value in adapter(tmp_path / "run").items())


def test_strategies_differ_after_the_first_task_only(whole: Path) -> None:
    base = whole / "results" / "sequences"
    first = {k: losses(base / f"{k}-lr0.01-order1-seed0/stages/01-sums") for k in strategies()}
    second = {k: losses(base / f"{k}-lr0.01-order1-seed0/stages/02-names") for k in strategies()}
    assert all(value == first["seq"] for value in first.values())
    assert len({tuple(second[k]) for k in ("seq", "er", "ewc", "i-lora")}) == 4


class Interruption:
    """Sends SIGTERM at chosen moments of a run, as a cluster would, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, moments: list[tuple[str, int]]) -> None:
        self.moments = moments
        self.counts = {"step": 0, "measurement": 0, "forward": 0}
        on_step, score = callbacks.Agreement.on_step_end, measuring._loss

        def step(agreement: Any, *args: Any, **more: Any) -> None:
            self.count("step")
            on_step(agreement, *args, **more)

        def measured(*args: Any, **more: Any) -> Any:
            self.count("measurement")
            return score(*args, **more)

        monkeypatch.setattr(callbacks.Agreement, "on_step_end", step)
        monkeypatch.setattr(measuring, "_loss", measured)

    def count(self, kind: str) -> None:
        self.counts[kind] += 1
        if self.moments and self.moments[0] == (kind, self.counts[kind]):
            self.moments.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.long
@pytest.mark.parametrize("name", ["er", "ewc", "i-lora", "folded", "contrast", "protect"])
def test_an_interrupted_sequence_is_the_uninterrupted_one(
    name: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the measurement of the backbone, within a task, in a measurement and within the last task."""
    recipe = load(tmp_path, entries=[entry(name)])
    moments = [("measurement", 2), ("step", 2), ("measurement", 8), ("step", 5), ("step", 8)]
    interruption = Interruption(monkeypatch, list(moments))
    summaries = [run_sequences(recipe)]
    while summaries[-1].signal is not None:
        assert len(summaries) <= len(moments), interruption.moments
        summaries.append(run_sequences(recipe, resume=True))
    assert [summary.signal for summary in summaries] == [signal.SIGTERM] * len(moments) + [None]
    assert interruption.moments == []
    expected, found = results(whole), results(tmp_path)
    label = f"{name}-lr0.01-order1-seed0"
    wanted = next(s for s in expected["sequences"] if s["label"] == label)
    assert timeless(found["sequences"]) == timeless([wanted])
    assert found["before"] == expected["before"]
    for task in ("01-sums", "02-names", "03-sizes"):
        stages = [f / "results/sequences" / label / "stages" / task for f in (whole, tmp_path)]
        first, second = (load_file(stage / "adapter/adapter_model.safetensors") for stage in stages)
        assert all(torch.equal(value, second[key]) for key, value in first.items())
        assert losses(stages[0]) == losses(stages[1])


@pytest.mark.parametrize("written", [1, 2, 3])
def test_a_signal_after_the_last_forward_of_a_measurement_is_not_lost(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the backbone's measurement, the first task's and the last one's; nothing is measured twice."""
    recipe = load(tmp_path, entries=[entry("seq")], tasks=["sums", "sizes"])
    write, files = measuring.atomic_write_json, []

    def told_to_end(path: Path, document: Any) -> None:
        write(path, document)
        files.append(path.name)
        if len(files) == written:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(measuring, "atomic_write_json", told_to_end)
    assert run_sequences(recipe).signal == signal.SIGTERM
    assert len(files) == written
    assert run_sequences(recipe, resume=True) == SequencesSummary(planned=1, finished=1, diverged=0)
    assert files == ["before.json", "01-sums.json", "02-sizes.json"]
    assert results(tmp_path)["status"] == "finished"
    assert not list((tmp_path / "results").glob("sequences/*/stages/*/checkpoints"))


def test_what_a_killed_write_left_is_removed(whole: Path) -> None:
    left = whole / "results/sequences/seq-lr0.01-order1-seed0/scores/.01-sums.json.abc.partial"
    kept = left.with_name(".01-sums.json.partial")
    left.touch()
    kept.touch()
    run_sequences(load(whole), resume=True)
    assert not left.exists()
    assert kept.exists() and not kept.unlink()


def test_a_finished_recipe_may_gain_entries_rates_orders_and_seeds(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "more")
    more = tmp_path / "more"
    before = results(more)["sequences"]
    values = json.loads((more / "sequences.json").read_text())
    values["entries"] = [entry("seq") | {"learning_rates": [0.01, 0.02]}, entry("er")]
    values["orders"] = [list(TASKS), ["sizes", "sums"]]
    values |= {"backbone": {"model": str(whole / "backbone"), "dtype": "float32"}}
    (more / "sequences.json").write_text(json.dumps(values))
    earlier = json.loads((more / "results/recipe.resolved.json").read_text())
    earlier["task_folders"], earlier["evaluation"] = values["task_folders"], earlier["evaluation"]
    for probe in earlier["evaluation"]["probes"]:
        probe["path"] = probe["path"].replace(str(whole), str(more))
    (more / "results/recipe.resolved.json").write_text(json.dumps(earlier))
    assert run_sequences(load(more), resume=True).finished == 6
    labels = [s["label"] for s in results(more)["sequences"]]
    assert labels == [
        "seq-lr0.01-order1-seed0", "seq-lr0.01-order2-seed0", "seq-lr0.02-order1-seed0",
        "seq-lr0.02-order2-seed0", "er-lr0.01-order1-seed0", "er-lr0.01-order2-seed0",
    ]  # fmt: skip
    kept = {s["label"]: s for s in results(more)["sequences"]}
    assert all(kept[s["label"]] | {"entry": s["entry"]} == s for s in before if s["label"] in kept)
    assert {s["entry"] for s in kept.values()} == {"seq, 0.01", "seq, 0.02", "er"}


def test_processes_that_share_the_sequences_fill_one_folder(whole: Path, tmp_path: Path) -> None:
    write_sequence_toy(tmp_path, entries=[entry("seq") | {"learning_rates": [0.01, 0.02]}, entry("lora")])
    late = run_sequences(load(tmp_path), share=Share(2, 2))  # the backbone is the first one's to measure
    assert late == SequencesSummary(planned=1, finished=1, diverged=0)
    assert not (tmp_path / "results" / "continual.json").exists()
    unfinished = tmp_path / "results" / "sequences" / ".other.partial"
    unfinished.write_text("of another process")
    assert run_sequences(load(tmp_path), resume=True, share=Share(1, 2)).finished == 2
    assert unfinished.exists()
    assert results(tmp_path)["status"] == "finished"
    expected = {s["label"]: s for s in results(whole)["sequences"]}
    for sequence in results(tmp_path)["sequences"]:
        if sequence["label"] in expected:
            same = expected[sequence["label"]] | {"entry": sequence["entry"]}
            assert timeless(sequence) == timeless(same)
    with pytest.raises(
        UserError, match="--share 4/4: the recipe has too few sequences .*: divide them by less"
    ):
        run_sequences(load(tmp_path), resume=True, share=Share(4, 4))


@pytest.mark.parametrize("given", ["0/2", "3/2", "2", "1/x", "-1/2", ""])
def test_a_share_that_is_none_is_said(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["recipe.json", f"--share={given}"])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"launch/continual.py: error: argument --share: {given!r} is no part such as 1/4"


@pytest.mark.parametrize("damage", ["missing", "cut", "without"])
def test_weights_that_an_earlier_task_has_not_left_whole_are_named(
    whole: Path, tmp_path: Path, damage: str
) -> None:
    """Contrast under M1 begins a task with the weights in the last task's adapter."""
    recipe = load(tmp_path, entries=[entry("contrast")])
    shutil.copytree(whole / "results", tmp_path / "results")
    folder = tmp_path / "results" / "sequences" / "contrast-lr0.01-order1-seed0"
    shutil.rmtree(folder / "stages" / "02-names")
    (folder / "scores" / "02-names.json").unlink()
    path = folder / "stages" / "01-sums" / "adapter" / "adapter_model.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        save_file({n: value for n, value in load_file(path).items() if not n.endswith("_W")}, path)
    resolved = tmp_path / "results" / "recipe.resolved.json"
    resolved.write_text(json.dumps(recipe.resolved()))
    with pytest.raises(UserError, match=r"01-sums.*: delete the folder of its sequence") as error:
        run_sequences(recipe, resume=True)
    assert "\n" not in str(error.value)
    shutil.rmtree(folder)
    assert run_sequences(recipe, resume=True).finished == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.max_steps=4", "training.max_steps is 4, but the sequences in .* started with 3"),
        ('tasks=["sums","names"]', "tasks is"),
        ("entries.0.adapter.cur_rank=5", "entry seq: adapter is"),
        ("backbone.dtype=bfloat16", "backbone.dtype is"),
    ],
)
def test_results_of_another_recipe_are_not_continued(whole: Path, change: str, said: str) -> None:
    with pytest.raises(UserError, match=f"--resume: {said}"):
        run_sequences(load(whole, change), resume=True)


def test_results_are_not_overwritten_unasked(whole: Path) -> None:
    with pytest.raises(UserError, match="already holds task sequences: --resume continues them, --overwrite"):
        run_sequences(load(whole))


def test_a_tasks_file_that_changed_is_noticed(whole: Path, tmp_path: Path) -> None:
    write_sequence_toy(tmp_path, entries=[entry("seq")])
    run_sequences(load(tmp_path))
    path = tmp_path / "tasks" / "sums-train.jsonl"
    path.write_text(path.read_text().replace("add 3 ", "plus 3 "))
    with pytest.raises(UserError, match="train.jsonl is not what the task holds now: restore"):
        run_sequences(load(tmp_path), resume=True)


def test_a_probe_that_changed_is_noticed_and_one_that_moved_is_not(tmp_path: Path) -> None:
    write_sequence_toy(tmp_path / "a", entries=[entry("seq")])
    recipe = load(tmp_path / "a")
    run_sequences(recipe)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    places = [f"output_dir={recipe.output_dir}", f"backbone.model={recipe.backbone.model}"]
    moved = load(tmp_path / "b", *places)
    assert run_sequences(moved, resume=True) == SequencesSummary(planned=1, finished=1, diverged=0)
    probe = tmp_path / "b" / "general.txt"
    probe.write_text(probe.read_text() + " One sentence more.")
    with pytest.raises(UserError, match="general.txt is not what the probe holds now: restore the probe's"):
        run_sequences(moved, resume=True)


@pytest.mark.parametrize("text", ["{", '{"evaluation": 5}', '{"evaluation": {"probes": [{}]}}'])
def test_a_damaged_record_of_the_recipe_is_said(text: str, tmp_path: Path) -> None:
    recipe = load(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "recipe.resolved.json").write_text(text)
    with pytest.raises(UserError, match=r"recipe.resolved.json is missing or damaged.*: --overwrite"):
        run_sequences(recipe, resume=True)

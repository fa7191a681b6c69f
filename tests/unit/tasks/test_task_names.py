"""Names of tasks: unknown ones, those found twice, groups, and those whose data lie on the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from evaluation_toys import byte_tokenizer, toy_model
from task_toys import GENERATION, write_task

from secura_ds.errors import UserError
from secura_ds.tasks import load_tasks, score_tasks

HUB = GENERATION.replace(
    "json\ndataset_kwargs:\n  data_files: {{train: train.jsonl, test: test.jsonl}}", "a/b"
)


def test_an_unknown_name_is_said_with_the_nearest_of_both_kinds(tmp_path: Path) -> None:
    write_task(tmp_path, name="arc_eas")
    with pytest.raises(UserError) as caught:
        load_tasks(["arc_esy", "gsm8", "zzzzzzzzz"], [tmp_path])
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("no task is called arc_esy; the nearest are arc_eas")
    assert "arc_easy" in lines[0]
    assert "gsm8k" in lines[1]
    assert lines[2].startswith(f"no task is called zzzzzzzzz (lm-eval's tasks, and YAML files in {tmp_path})")


def test_a_broken_file_is_named_where_a_name_is_not_found_and_only_there(tmp_path: Path) -> None:
    write_task(tmp_path)
    (tmp_path / "broken.yaml").write_text("task: [\n")
    assert [task.name for task in load_tasks(["toy"], [tmp_path])] == ["toy"]
    with pytest.raises(UserError, match=r"broken\.yaml:\d+: not YAML[^\n]*\nno task is called broken"):
        load_tasks(["broken"], [tmp_path])


def test_a_name_found_or_given_twice_is_refused(tmp_path: Path) -> None:
    first, second = write_task(tmp_path / "a"), write_task(tmp_path / "b")
    with pytest.raises(UserError, match=f"{second} and {first} both define the task toy; rename one"):
        load_tasks(["toy"], [tmp_path])
    with pytest.raises(UserError, match="two of the tasks are called toy"):
        load_tasks([str(first), str(second)], [])
    with pytest.raises(UserError, match="the task toy is given twice"):
        load_tasks(["toy", "toy"], [tmp_path / "a"])


def test_groups_missing_files_and_folders_are_one_line_each(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"ai2_arc is a group of tasks; name single ones: arc_challenge, arc_ea"
    ):
        load_tasks(["ai2_arc"], [])
    with pytest.raises(UserError, match=r"missing\.yaml: no such file"):
        load_tasks([str(tmp_path / "missing.yaml")], [])
    with pytest.raises(UserError, match="no such folder of tasks"):
        load_tasks(["toy"], [tmp_path / "nowhere"])


def test_without_the_hub_it_says_which_tasks_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    write_task(tmp_path / "near")
    write_task(tmp_path / "far", HUB, name="far")
    with pytest.raises(UserError) as caught:
        load_tasks(["arc_easy", "toy", "far"], [tmp_path])
    assert str(caught.value).splitlines() == [
        "arc_easy: the hub data set allenai/ai2_arc (subset ARC-Easy) cannot be loaded: no route to host",
        "far: the hub data set a/b cannot be loaded: no route to host",
        "these tasks need the hub: arc_easy, far; without it: toy",
    ]


def test_rows_of_the_hub_are_used_like_rows_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        split: [{"prompt": f"{split} {i}", "completion": "x"} for i in range(6)]
        for split in ("train", "test")
    }
    data = DatasetDict({split: Dataset.from_list(found) for split, found in rows.items()})
    asked: list[object] = []
    monkeypatch.setattr("datasets.load_dataset", lambda **given: asked.append(given) or data)
    (task,) = load_tasks([str(write_task(tmp_path, HUB))], [])
    assert asked == [{"path": "a/b", "name": None}]
    assert task.needs_hub
    assert len(task.training_examples()) == 5
    assert score_tasks(toy_model(), byte_tokenizer(), [task], progress=False)["toy"]["n"] == 6

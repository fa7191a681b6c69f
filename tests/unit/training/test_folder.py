from __future__ import annotations

import json
from pathlib import Path

import pytest

from secura_ds.data import DataReport, SourceReport
from secura_ds.errors import UserError
from secura_ds.training import folder as folders


def finished(folder: Path) -> Path:
    (folder / "checkpoints" / "step-000003").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "finished"}))
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "notes.txt").write_text("mine")
    return folder


def test_a_new_folder_is_made(tmp_path: Path) -> None:
    folders.check(tmp_path / "a" / "b", resume=False, overwrite=False)
    folders.claim(tmp_path / "a" / "b", overwrite=False)
    assert (tmp_path / "a" / "b").is_dir()


def test_a_finished_run_is_kept(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    with pytest.raises(UserError, match=r"already holds a run \(status finished\): --resume .* --overwrite"):
        folders.check(folder, resume=False, overwrite=False)
    assert (folder / "run.json").is_file()


def test_a_run_that_was_cut_off_is_kept(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    (folder / "run.json").unlink()
    with pytest.raises(UserError, match="already holds a run that was cut off"):
        folders.check(folder, resume=False, overwrite=False)


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    folders.check(folder, resume=False, overwrite=True)
    folders.claim(folder, overwrite=True)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


def test_resume_keeps_the_run_and_clears_what_was_half_written(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    (folder / "checkpoints" / ".step-000004.x.partial").mkdir()
    (folder / ".adapter.y.partial").write_text("")
    folders.check(folder, resume=True, overwrite=False)
    folders.claim(folder, overwrite=False)
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoints", "metrics.jsonl", "notes.txt"]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000003"]


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give one of them"):
        folders.check(tmp_path, resume=True, overwrite=True)


def test_another_recipe_is_not_continued(tmp_path: Path) -> None:
    before = {"name": "a", "adapter": {"cur_rank": 8}, "training": {"max_steps": 5}}
    (tmp_path / "recipe.resolved.json").write_text(json.dumps(before))
    longer = {"name": "b", "adapter": {"cur_rank": 8}, "training": {"max_steps": 9}}
    folders.check_same_run(tmp_path / "recipe.resolved.json", longer)
    other = {**before, "adapter": {"cur_rank": 16}}
    with pytest.raises(UserError, match="adapter.cur_rank is 16, but .* started with 8"):
        folders.check_same_run(tmp_path / "recipe.resolved.json", other)


def test_changed_examples_are_not_continued(tmp_path: Path) -> None:
    def report(*said: str) -> DataReport:
        sources = [SourceReport(f"{n}.jsonl", 5, 0, 0, [], text) for n, text in enumerate(said)]
        return DataReport(sources=sources)

    (tmp_path / "data.json").write_text(json.dumps(report("one", "two").to_dict()))
    folders.check_same_data(tmp_path / "data.json", report("one", "two"))
    with pytest.raises(UserError, match=r"--resume: the examples of 1\.jsonl are not those .* --overwrite"):
        folders.check_same_data(tmp_path / "data.json", report("one", "changed"))
    folders.check_same_data(tmp_path / "none.json", report("other"))


def test_a_run_that_was_moved_with_its_data_is_the_same(tmp_path: Path) -> None:
    def settings(root: str, data: str) -> dict[str, object]:
        return {"training": {"output_dir": f"{root}/runs/a"}, "data": {"sources": [{"path": data}]}}

    earlier = tmp_path / "recipe.resolved.json"
    earlier.write_text(json.dumps(settings("/old", "/old/tasks/sums.jsonl")))
    folders.check_same_run(earlier, settings("/new", "/new/tasks/sums.jsonl"))
    folders.check_same_run(earlier, settings("/new", "/old/tasks/sums.jsonl"))
    for other in ("/new/tasks/names.jsonl", "/new/sums.jsonl", "/other/tasks/sums.jsonl"):
        with pytest.raises(UserError, match=r"--resume: data\.sources is .*, but .* started with"):
            folders.check_same_run(earlier, settings("/new", other))


@pytest.mark.parametrize(
    ("key", "before", "after"),
    [
        ("model", "one", "another"),
        ("quantization", None, {"kind": "nf4"}),
        ("quantization", {"kind": "nf4"}, None),
    ],
)
def test_another_backbone_is_not_the_same_run(
    tmp_path: Path, key: str, before: object, after: object
) -> None:
    earlier = tmp_path / "recipe.resolved.json"
    earlier.write_text(json.dumps({"backbone": {key: before}}))
    folders.check_same_run(earlier, {"backbone": {key: before}})
    with pytest.raises(UserError, match=rf"--resume: backbone\.{key} is .* was started with .* --overwrite"):
        folders.check_same_run(earlier, {"backbone": {key: after}})

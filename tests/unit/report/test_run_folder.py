"""Run folders with everything, with little, and torn."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_run import make_run

from secura_ds.errors import UserError
from secura_ds.report.run_folder import read_run, read_runs


def test_a_whole_run_is_read(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", steps=12, blocks=3))
    assert (run.label, run.method, run.setting("adapter", "smagnorm", "apply")) == (
        "smollm2-135m",
        "secura",
        "forward",
    )
    steps, losses = run.series("loss")
    assert steps == [float(step) for step in range(1, 13)] and losses[0] > 1 > losses[-1]
    assert run.series("eval_loss")[0] == [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    layers = run.layer_series("relative_change")
    assert len(layers) == 6 and layers["model.layers.2.self_attn.v_proj"][0] == steps
    assert run.skipped_lines == {} and run.merge is not None and run.merge["adapted_tensors"] == 60


def test_a_torn_last_line_is_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n\n{"step": 2, "lo', encoding="utf-8")
    run = read_run(tmp_path)
    assert run.series("loss") == ([1.0], [2.5])
    assert run.skipped_lines == {"metrics.jsonl": 1}
    assert (run.recipe, run.after, run.statistics, run.label) == (None, None, [], tmp_path.name)


def test_a_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    rows = [
        '{"step": 1, "loss": 3}',
        '{"step": 2, "loss": 9}',
        '{"step": 2, "eval_loss": 8}',
        '{"step": 2, "loss": 2}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows), encoding="utf-8")
    run = read_run(tmp_path)
    assert run.series("loss") == ([1.0, 2.0], [3.0, 2.0])
    assert run.series("eval_loss") == ([2.0], [8.0])


def test_values_that_are_not_finite_or_no_numbers_are_left_out(tmp_path: Path) -> None:
    rows = [
        '{"step": 1, "loss": NaN}',
        '{"step": 2, "loss": "2"}',
        '{"step": 3, "loss": 1.5}',
        "[1]",
        '{"loss": 4}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows), encoding="utf-8")
    run = read_run(tmp_path)
    assert run.series("loss") == ([3.0], [1.5])
    assert run.skipped_lines == {"metrics.jsonl": 2}


@pytest.mark.parametrize("make", [False, True])
def test_what_is_no_run_folder_is_refused(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "pictures"
    if make:
        folder.mkdir()
    with pytest.raises(UserError, match="is no run folder" if make else "is no folder") as error:
        read_run(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_broken_document_is_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=2, blocks=1)
    (folder / "evaluation.after.json").write_text('{"task": ', encoding="utf-8")
    with pytest.raises(UserError, match=r"evaluation\.after\.json: not JSON"):
        read_run(folder)
    (folder / "evaluation.after.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="expected a JSON object, found list"):
        read_run(folder)


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a" / "first", steps=2, blocks=1)
    two = make_run(tmp_path / "a" / "second", steps=2, blocks=1)
    three = make_run(tmp_path / "b" / "first", steps=2, blocks=1)
    lora = make_run(tmp_path / "lora", name="other", method="lora", steps=2, blocks=1)
    assert [run.label for run in read_runs([one, lora])] == ["smollm2-135m", "other"]
    assert [run.label for run in read_runs([one, two])] == ["first", "second"]
    assert [run.label for run in read_runs([one, three])] == [str(one), str(three)]
    with pytest.raises(UserError, match="given twice"):
        read_runs([one, tmp_path / "a" / ".." / "a" / "first"])
    with pytest.raises(UserError, match="no run folder given"):
        read_runs([])

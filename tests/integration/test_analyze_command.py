"""`launch/analyze.py` as a user calls it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_continual import make_continual
from fake_run import make_run
from merge_toys import TARGETS, make_base, make_secura

from secura_ds.errors import run_command

COMMAND = Path(__file__).parents[2] / "launch" / "analyze.py"


@pytest.fixture(scope="module")
def command() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(COMMAND), run_name="analyze_command"))


@pytest.mark.parametrize(
    ("analysis", "column"), [("spectra", "norm_change"), ("changes", "relative_change"), ("limiter", "mean")]
)
def test_a_run_is_analysed_with_the_base_it_names(
    command: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], analysis: str, column: str
) -> None:
    base = make_base(tmp_path / "base")
    run = tmp_path / "run"
    run.mkdir()
    make_secura(run / "adapter", base)
    recipe = {"backbone": {"model": str(base)}}
    (run / "recipe.resolved.json").write_text(json.dumps(recipe), encoding="utf-8")
    assert run_command(command.main, [analysis, str(run), "--out", str(tmp_path / "out.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(TARGETS) + 4 and lines[-1] == f"written: {tmp_path / 'out.json'}"
    document = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert document["analysis"] == analysis and sorted(document["rows"]) == sorted(TARGETS)
    values = [row[column] for row in document["rows"].values()]
    assert document["mean_over_layers"][column] == pytest.approx(sum(values) / len(values))
    assert run_command(command.main, [analysis, str(run / "adapter"), "--base", str(base)]) == 0
    assert capsys.readouterr().out.splitlines() == lines[:-1]


def test_gradients_of_runs_and_of_sequences(
    command: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(make_run(tmp_path / name, name=name, steps=6, blocks=1)) for name in ("one", "two")]
    assert run_command(command.main, ["gradients", *runs]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "mean", "variance", "smallest", "largest", "range", "steps"]
    assert [line.split()[0] for line in lines[2:]] == ["one", "two"] and lines[2].split()[-1] == "6"
    results = str(make_continual(tmp_path / "results", tasks=2, entries=1, seeds=1))
    assert run_command(command.main, ["gradients", results]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[0::6] == ["secura", "40"]
    assert run_command(command.main, ["gradients", results, runs[0]]) == 2


def test_what_cannot_be_analysed_ends_in_one_line(
    command: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_secura(tmp_path / "adapter", base)
    empty = make_continual(tmp_path / "empty", entries=1, seeds=1, runs=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    capsys.readouterr()
    for arguments, words in (
        (["spectra", str(tmp_path / "absent")], "no such file"),
        (["changes", str(adapter)], "base is toy: no such folder"),
        (["limiter", str(adapter), "--base", str(adapter)], "adapter"),
        (["gradients", str(empty)], "has logged no gradient norms"),
        (["gradients", str(tmp_path / "run")], "has no gradient norms"),
    ):
        assert run_command(command.main, arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ") and words in captured.err
        assert captured.err.count("\n") == 1

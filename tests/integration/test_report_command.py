"""`launch/report.py` as a user calls it."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_continual import make_continual
from fake_run import make_run

from secura_ds.errors import run_command

COMMAND = Path(__file__).parents[2] / "launch" / "report.py"


@pytest.fixture(scope="module")
def command() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(COMMAND), run_name="report_command"))


def test_one_run_gives_a_page_and_its_path(
    command: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run", steps=4, blocks=2)
    assert run_command(command.main, [str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert (folder / "report.html").stat().st_size > 100_000
    assert not list(folder.glob(".*partial"))


def test_several_runs_go_to_comparison_here(
    command: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make_run(tmp_path / name, name=name, steps=4, blocks=2) for name in ("one", "two")]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run_command(command.main, [str(folder) for folder in folders]) == 0
    assert sorted(path.name for path in Path().iterdir()) == ["comparison-plots", "comparison.html"]


def test_results_of_task_sequences_give_a_page(
    command: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_continual(tmp_path / "results", tasks=2, entries=1, seeds=1, runs=False)
    assert run_command(command.main, [str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert (folder / "plots" / "matrix-1.png").stat().st_size > 5_000
    (folder / "continual.json").write_text('{"format": 1,', encoding="utf-8")
    assert run_command(command.main, [str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {folder}/continual.json: not JSON")
    assert captured.err.count("\n") == 1


def test_bad_folders_end_in_one_line(
    command: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run", steps=4, blocks=2)
    before = sorted(tmp_path.rglob("*"))
    for arguments in ([str(tmp_path / "absent")], [str(tmp_path)], [str(folder), str(folder)]):
        assert run_command(command.main, arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before

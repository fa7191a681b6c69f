"""The shipped tasks: current with their generators, sound, small, and each learnable from what it ships."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TASKS = ROOT / "recipes" / "tasks"
sys.path.insert(0, str(ROOT / "benchmarks" / "tasks"))

import make  # noqa: E402
import packages  # noqa: E402
import quantities  # noqa: E402
import rows  # noqa: E402
from invented import plural  # noqa: E402

from secura_ds.errors import UserError  # noqa: E402
from secura_ds.reading import read_rows  # noqa: E402
from secura_ds.tasks import Task, load_tasks  # noqa: E402

NAMES = sorted(path.stem for path in TASKS.rglob("*.yaml") if path.parent.name != "hub")
LOADED = {task.name: task for task in load_tasks(NAMES, [TASKS])}


def turns(task: Task) -> dict[str, list[tuple[str, str]]]:
    """Prompt and completion of every row, by part."""
    parts = {
        "train": task.training_examples(),
        "validation": task.validation_examples(),
        "test": task.held_out_examples(),
    }
    return {
        name: [(e.messages[0]["content"], e.messages[1]["content"]) for e in found]
        for name, found in parts.items()
    }


def test_files_are_current_with_their_generators_and_checksums() -> None:
    for name, split in make.generated().items():
        for part, made in zip(("train", "test"), split, strict=True):
            assert (TASKS / name / f"{part}.jsonl").read_text(encoding="utf-8") == rows.to_jsonl(made), name
    make.check(TASKS)


def test_a_changed_file_does_not_pass_the_check(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.jsonl").write_text("{}\n")
    (tmp_path / "SHA256SUMS").write_text(make.checksums(tmp_path))
    make.check(tmp_path)
    (tmp_path / "a" / "train.jsonl").write_text("{ }\n")
    with pytest.raises(UserError, match=r"not as in SHA256SUMS: a/train\.jsonl"):
        make.check(tmp_path)


def test_there_are_enough_tasks_of_both_kinds_and_they_are_small() -> None:
    assert len(LOADED) >= 16
    assert not any(task.needs_hub for task in LOADED.values())
    assert sum(task.is_choice for task in LOADED.values()) >= 2
    assert sum(path.stat().st_size for path in TASKS.rglob("*") if path.is_file()) < 3_000_000


@pytest.mark.parametrize("name", NAMES)
def test_parts_do_not_overlap_and_answers_are_short(name: str) -> None:
    parts = turns(LOADED[name])
    assert len(parts["train"]) >= 500
    assert len(parts["validation"]) >= 100
    assert len(parts["test"]) >= 100
    everything = [prompt for found in parts.values() for prompt, _ in found]
    assert len(set(everything)) == len(everything)
    assert max(len(prompt) for prompt in everything) < 300
    assert max(len(answer) for found in parts.values() for _, answer in found) < 130
    assert all(
        answer == answer.strip() and "\n" not in answer for found in parts.values() for _, answer in found
    )


@pytest.mark.parametrize("name", NAMES)
def test_no_answer_alone_scores_much_on_held_out_rows(name: str) -> None:
    answers = [answer for _, answer in turns(LOADED[name])["test"]]
    commonest = max(answers.count(answer) for answer in set(answers)) / len(answers)
    assert commonest <= 0.3


def test_held_out_facts_are_those_learnt_in_other_words() -> None:
    parts = turns(LOADED["invented_facts"])
    asked = [prompt.split(": ")[-1] for prompt, _ in parts["test"]]
    wordings = {prompt.replace(person, "_") for prompt in asked for person in _people(prompt)}
    assert len(wordings) == 4
    assert not any(
        wording.replace("_", "").strip("? ") in prompt for wording in wordings for prompt, _ in parts["train"]
    )
    learnt = " ".join(prompt for prompt, _ in parts["train"])
    assert all(person in learnt for prompt, _ in parts["test"] for person in _people(prompt))


def _people(prompt: str) -> list[str]:
    words = prompt.rstrip("?").split()
    pairs = [f"{a} {b}" for a, b in zip(words, words[1:], strict=False) if a[0].isupper() and b[0].isupper()]
    return pairs[-1:]


def test_package_lines_are_in_one_task_and_one_split_only() -> None:
    found = [
        row["package"]
        for name in ("package_en_de", "package_de_en", "package_sections")
        for part in ("train", "test")
        for _, row in read_rows(TASKS / name / f"{part}.jsonl")
    ]
    assert len(found) == 3 * (rows.TRAIN_ROWS + rows.TEST_ROWS)
    assert len(set(found)) > 0.99 * len(
        found
    )  # a package may have two descriptions, in two architectures' lists
    chosen = {row["section"] for _, row in read_rows(TASKS / "package_sections" / "test.jsonl")}
    assert chosen == set(packages.SECTIONS)
    assert LOADED["package_sections"].chance == 1 / len(packages.SECTIONS)
    assert len(json.loads((TASKS / "packages-source.json").read_text())) == 3


def test_rules_of_the_generators_by_known_cases() -> None:
    assert [quantities.roman(n) for n in (4, 9, 40, 944, 1199)] == ["IV", "IX", "XL", "CMXLIV", "MCXCIX"]
    assert [plural(word) for word in ("tok", "rem", "bras")] == ["ttoka", "remen", "brasovi"]


def test_the_readme_has_every_task_and_the_measured_scores() -> None:
    text = (TASKS / "README.md").read_text(encoding="utf-8")
    figures = json.loads((ROOT / "benchmarks" / "results" / "task_baselines.json").read_text())
    assert set(figures) == set(NAMES)
    for name, task in LOADED.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        row, scale = figures[name], 1 if task.maximum == 100 else 100
        before = f"{row['score'] * scale:.1f} ± {row['stderr'] * scale:.1f}"
        assert before in line
        assert row["metric"] == task.metric
        # What is known beforehand is no task: most of the way from guessing to perfect is to be left.
        assert (row["score"] - task.chance) / (task.maximum - task.chance) < 0.4
    for path in (TASKS / "hub").glob("*.yaml"):
        assert f"| `{path.stem}` |" in text

"""Recipes and lines that the documentation shows: they are what the programs take."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from secura_ds.evaluation.choice import read_questions
from secura_ds.recipe import load_sequence_recipe
from secura_ds.recipe.adapter import AnyMethod, SecuraAdapter

REPOSITORY = Path(__file__).resolve().parents[3]


def test_the_comparison_in_the_documentation_is_a_recipe(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "continual.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "mine.json").write_text(shown, encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    for name in ("my-questions.jsonl", "my-text.txt"):
        (tmp_path / name).write_text("", encoding="utf-8")
    recipe = load_sequence_recipe(tmp_path / "mine.json")
    assert len(list(recipe.sequences())) == 2 * 3 * 3 * 3


def test_secura_without_settings_is_what_the_studies_found_best() -> None:
    bare = TypeAdapter(AnyMethod).validate_python({"method": "secura"}).model_dump(mode="json")
    recipe = load_sequence_recipe(REPOSITORY / "recipes" / "continual" / "smollm2-frontier.json")
    studied = recipe.entries[0].adapter.model_dump(mode="json")
    studied["calibration"]["num_tokens"] = bare["calibration"]["num_tokens"]
    studied["target_modules"] = bare["target_modules"]
    assert bare == studied


@pytest.mark.parametrize(
    "given", [{"selection": "least"}, {"selection": "sampled"}, {"calibration": {"mode": "null"}}]
)
def test_secura_with_another_selection_starts_as_published(given: dict[str, Any]) -> None:
    adapter = TypeAdapter(AnyMethod).validate_python({"method": "secura", **given})
    assert isinstance(adapter, SecuraAdapter)
    assert (adapter.init, adapter.smagnorm.apply) == ("block", "merge")


def test_the_question_in_the_documentation_is_one(tmp_path: Path) -> None:
    text = (REPOSITORY / "recipes" / "tasks" / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r'^ +(\{"question".*\})$', text, flags=re.M)
    (tmp_path / "q.jsonl").write_text(shown + "\n", encoding="utf-8")
    (question,) = read_questions(tmp_path / "q.jsonl")
    assert question.choices[question.answer] == "Nairobi"


@pytest.mark.parametrize(
    ("variables", "passed"),
    [
        ({}, ["r.json"]),
        (
            {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_MIN": "10"},
            ["r.json", "--resume", "--share", "3/4"],
        ),
    ],
)
def test_an_array_of_jobs_shares_the_sequences_out(
    variables: dict[str, str], passed: list[str], tmp_path: Path
) -> None:
    (tmp_path / "launch" / "slurm").mkdir(parents=True)
    (tmp_path / "launch" / "slurm" / "job.sh").write_text("run_on_nodes() { printf '%s\\n' \"$@\"; }\n")
    script = str(REPOSITORY / "launch" / "slurm" / "continual.sbatch")
    environment = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path), **variables}
    done = subprocess.run(["bash", script, "r.json"], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["launch/continual.py", *passed], done.stderr

"""A toy task as a YAML file with its rows, for tests of tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GENERATION = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{train: train.jsonl, test: test.jsonl}}
training_split: train
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: completion
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6}}
metric_list:
  - metric: exact_match
"""
CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{train: train.jsonl, test: test.jsonl}}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def write_task(
    folder: Path, text: str = GENERATION, *, name: str = "toy", train: int = 12, test: int = 5
) -> Path:
    """A YAML file and its rows in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(text.format(name=name))
    chosen = "multiple_choice" in text
    for split, number in (("train", train), ("test", test)):
        rows = [choice_row(split, i) if chosen else written_row(split, i) for i in range(number)]
        write_rows(folder / f"{split}.jsonl", rows)
    return path


def written_row(split: str, number: int) -> dict[str, Any]:
    return {"prompt": f"{split} {number}?", "completion": f"yes {number}"}


def choice_row(split: str, number: int) -> dict[str, Any]:
    return {"prompt": f"{split} {number}?", "choices": ["a b", "cc", "d"], "answer": number % 3}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

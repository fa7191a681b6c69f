"""Three small tasks, probes and a recipe of task sequences on a toy backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training_toys import PAPER, toy_recipe, write_toy

from secura_ds.recipe import SequenceRecipe, load_sequence_recipe

SECURA = PAPER | {"cur_rank": 7, "inner_rank": 9}
CONTRAST = SECURA | {
    "strategy": "M1",
    "selection": "calibrated",
    "init": "orthonormal",
    "calibration": {"mode": "contrast", "num_tokens": 320},
}
TASKS = ("sums", "names", "sizes")
_WRITTEN = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {name}-train.jsonl
    test: {name}-test.jsonl
training_split: train
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
_CHOSEN = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {name}-train.jsonl
    test: {name}-test.jsonl
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_sequence_toy(folder: Path, **changes: Any) -> Path:
    """Backbone, tasks, probes and a recipe in `folder`; returns the recipe's path.

    Args:
        changes: of the recipe's top level.
    """
    write_toy(folder)
    tasks = folder / "tasks"
    tasks.mkdir()
    written = {
        "sums": lambda i: {"prompt": f"add {i} and 1", "completion": f"{i + 1}"},
        "names": lambda i: {"prompt": f"name {i}", "completion": "ab" if i % 2 else "ba"},
    }
    for name, row in written.items():
        _write_task(tasks, name, _WRITTEN, [row(i) for i in range(36)])
    sizes = [
        {"question": f"size {i}?", "choices": ["small", "large"], "answer": int(i > 17)} for i in range(36)
    ]
    _write_task(tasks, "sizes", _CHOSEN, sizes)
    (folder / "general.txt").write_text("the cat sat on the mat and then it left again. " * 20)
    knowledge = [{"question": f"q{i}", "choices": ["a", "bb", "c"], "answer": i % 3} for i in range(9)]
    (folder / "knowledge.jsonl").write_text("".join(json.dumps(row) + "\n" for row in knowledge))
    path = folder / "sequences.json"
    path.write_text(json.dumps(sequence_recipe() | changes, indent=1))
    return path


def _write_task(folder: Path, name: str, form: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{name}.yaml").write_text(form.format(name=name))
    for part, chosen in (("train", rows[:28]), ("test", rows[28:])):
        (folder / f"{name}-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))


def sequence_recipe() -> dict[str, Any]:
    one = toy_recipe()
    training = {
        key: value for key, value in one["training"].items() if key not in ("output_dir", "learning_rate")
    }
    return {
        "name": "toy-sequences",
        "output_dir": "results",
        "backbone": one["backbone"],
        "tasks": list(TASKS),
        "task_folders": ["tasks"],
        "entries": [
            {
                "name": "secura",
                "adapter": SECURA,
                "learning_rates": [0.01],
            }
        ],
        "data": {"max_length": 64},
        "training": training | {"max_steps": 3, "gradient_accumulation_steps": 1},
        "evaluation": {
            "probes": [
                {"kind": "multiple_choice", "path": "knowledge.jsonl"},
                {"kind": "text_loss", "path": "general.txt"},
            ]
        },
    }


def strategies() -> dict[str, dict[str, Any]]:
    """One of each kind, small enough for the toy."""
    return {
        "seq": {"kind": "seq"},
        "er": {"kind": "er", "buffer_size": 6, "per_step": 2},
        "ewc": {"kind": "ewc", "penalty": 50.0, "fisher_examples": 4},
        "online": {"kind": "ewc", "penalty": 50.0, "fisher_examples": 4, "online": True},
        "i-lora": {"kind": "i-lora", "buffer_size": 6, "per_step": 2, "ema_decay": 0.5},
    }


def load(folder: Path, *options: str, **changes: Any) -> SequenceRecipe:
    """The recipe in `folder`, written if it is not there, with its results beside it."""
    if not (folder / "sequences.json").is_file():
        write_sequence_toy(folder, **changes)
    return load_sequence_recipe(folder / "sequences.json", [f"output_dir={folder / 'results'}", *options])


def results(folder: Path) -> dict[str, Any]:
    """The document of the results beside the recipe."""
    return dict(json.loads((folder / "results" / "continual.json").read_text()))

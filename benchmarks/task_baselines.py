"""What the base model scores on the shipped tasks before any training, and what a short training reaches.

python benchmarks/task_baselines.py --out benchmarks/results/task_baselines.json
python benchmarks/task_baselines.py --steps 60 --tasks contacts    # train on it alone, score again
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from secura_ds.data import encode
from secura_ds.embedded import embedded_checkpoint
from secura_ds.errors import run_command
from secura_ds.files import atomic_write_json
from secura_ds.report import format_table
from secura_ds.tasks import Task, load_tasks, score_tasks

TASKS = Path(__file__).resolve().parents[1] / "recipes" / "tasks"
BATCH = 8
SETTINGS = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
LEARNING_RATE = 1e-3
MAX_LENGTH = 160
DTYPE = torch.bfloat16


def shipped() -> list[str]:
    """Names of the tasks that need no hub."""
    return sorted(path.stem for path in TASKS.rglob("*.yaml") if path.parent.name != "hub")


def trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, steps: int) -> None:
    """Train LoRA in `model` on a task's first rows, in order, at a rate that falls to zero."""
    examples = [encode(e, tokenizer, max_length=MAX_LENGTH) for e in task.training_examples(steps * BATCH)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for step in range(steps):
        # Where a task has too few rows, it goes on with the first ones.
        rows = [examples[(step * BATCH + i) % len(examples)] for i in range(BATCH)]
        width = max(len(row.input_ids) for row in rows)
        ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows])
        labels = torch.tensor([row.labels + [-100] * (width - len(row.labels)) for row in rows])
        mask = torch.tensor([[1] * len(r.input_ids) + [0] * (width - len(r.input_ids)) for r in rows])
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def measure(name: str, items: int, steps: int, kept: dict[str, Any]) -> dict[str, Any]:
    """A task's score before training, unless `kept` has it, and with `steps` after."""
    folder = embedded_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE)
    task = load_tasks([name], [TASKS])[0]
    row = kept
    if (row.get("n"), row.get("dtype")) != (items, str(DTYPE)):
        before = score_tasks(model, tokenizer, [task], max_items=items, progress=False)[name]
        row = {key: before[key] for key in ("metric", "score", "stderr", "n", "chance", "maximum")}
        row["dtype"] = str(DTYPE)
    if steps:
        torch.manual_seed(0)
        adapted = get_peft_model(model, SETTINGS)
        start = time.perf_counter()
        trained(adapted, tokenizer, task, steps)
        seconds = round(time.perf_counter() - start, 1)
        after = score_tasks(adapted, tokenizer, [task], max_items=items, progress=False)[name]
        row |= {"steps": steps, "trained_score": after["score"], "trained_stderr": after["stderr"]}
        row["training_seconds"] = seconds
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=shipped(), help="names of tasks; all shipped ones")
    parser.add_argument("--items", type=int, default=60, help="held-out rows of each task")
    parser.add_argument("--steps", type=int, default=0, help=f"also train on each task, batches of {BATCH}")
    parser.add_argument(
        "--out",
        type=Path,
        help="add the figures to this JSON file, and take from it what was scored before training",
    )
    arguments = parser.parse_args(argv)
    kept = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    found: dict[str, dict[str, Any]] = {}
    for name in arguments.tasks:
        found[name] = measure(name, arguments.items, arguments.steps, kept.get(name, {}))
        print(name, found[name], flush=True)
        if arguments.out:
            atomic_write_json(arguments.out, dict(sorted({**kept, **found}.items())))
    rows = [
        [name, row["metric"], f"{row['score']:.3f}", f"{row.get('trained_score', float('nan')):.3f}"]
        for name, row in found.items()
    ]
    print(format_table(["task", "metric", "before", f"after {arguments.steps} steps"], rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))

"""What a run folder lacks, and the command that makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secura_ds.report.run_folder import RunFolder

TRAIN = "deepspeed launch/train.py RECIPE"


@dataclass(frozen=True)
class Missing:
    """One absent file: whose, which, and what writes it."""

    run: str
    file: str
    remedy: str


def missing_notes(runs: Sequence[RunFolder]) -> dict[str, list[Missing]]:
    """Absent files by the section of the page that wants them."""
    notes: dict[str, list[Missing]] = {
        name: [] for name in ("scores", "curves", "layers", "merge", "recipe", "environment")
    }
    for run in runs:
        for section, file, there, remedy in _wanted(run):
            if not there:
                notes[section].append(Missing(run.label, file, remedy))
    return notes


def _wanted(run: RunFolder) -> list[tuple[str, str, bool, str]]:
    evaluate = "python launch/evaluate.py RECIPE"
    whole = run.method == "full"
    result = f"--model {run.path}/model" if whole else f"--adapter {run.path}/adapter"
    wanted = [
        (
            "scores",
            "evaluation.before.json",
            run.before is not None,
            f"{evaluate} --out {run.path}/evaluation.before.json",
        ),
        (
            "scores",
            "evaluation.after.json",
            run.after is not None,
            f"{evaluate} {result} --out {run.path}/evaluation.after.json",
        ),
        ("curves", "metrics.jsonl", bool(run.metrics), TRAIN),
        (
            "merge",
            "merge.json",
            run.merge is not None or whole,
            f"python launch/merge.py --base DIR --adapter {run.path}/adapter --out DIR",
        ),
        ("recipe", "recipe.resolved.json", run.recipe is not None, TRAIN),
        ("environment", "environment.json", run.environment is not None, TRAIN),
    ]
    if run.method in ("secura", "cabr", "cur-lora"):
        wanted.append(("layers", "statistics.jsonl", bool(run.statistics), TRAIN))
    return wanted

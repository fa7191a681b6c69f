"""One rank of two that trains what RUNS lists, and goes on from a checkpoint in the middle of each run.

Started by the deepspeed launcher: families_worker.py RUNS RESULT. One launch for all, as starting costs most.
RUNS holds, by output folder, a recipe and its settings. A run is kept as a kill after its first checkpoint
would leave it, in `<folder>-cut`, and resumed there.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from secura_ds.environment import is_main_process
from secura_ds.ranks import end_process
from secura_ds.recipe import load_recipe
from secura_ds.training import train


def main() -> None:
    runs, result = (Path(argument) for argument in sys.argv[-2:])
    found: dict[str, str] = {}
    for name, (recipe, settings) in json.loads(runs.read_text()).items():
        found[name] = train(load_recipe(recipe, [*settings, f"training.output_dir={name}"])).status
        if is_main_process():
            cut_short(Path(name), Path(f"{name}-cut"))
        torch.distributed.barrier()
        again = load_recipe(recipe, [*settings, f"training.output_dir={name}-cut"])
        found[f"{name}-cut"] = train(again, resume=True).status
    if is_main_process():
        result.write_text(json.dumps(found))


def cut_short(run: Path, cut: Path) -> None:
    """Copy `run` as it was at its first checkpoint; its log goes on, as after a kill between two saves."""
    shutil.copytree(run, cut, ignore=shutil.ignore_patterns("adapter", "run.json"))
    first, *later = sorted((cut / "checkpoints").glob("step-*"))
    assert later, f"{run} has no checkpoint but {first}"
    for checkpoint in later:
        shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main()
    end_process(0)

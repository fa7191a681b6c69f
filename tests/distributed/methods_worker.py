"""One rank of two that trains the toy with several methods under DeepSpeed; writes what happened as JSON.

Started by the deepspeed launcher: methods_worker.py RECIPE RESULT.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from method_toys import override  # noqa: E402

from secura_ds.errors import UserError  # noqa: E402
from secura_ds.ranks import end_process  # noqa: E402
from secura_ds.recipe import load_recipe  # noqa: E402
from secura_ds.training import train  # noqa: E402

CASES = {
    "cur-lora": ("cur-lora", 3),
    "cabr": ("cabr", 3),
    "full": ("full", 3),
    "full, ZeRO-2": ("full", 2),
    "corda": ("corda", 2),
    "osf": ("osf", 2),
}
RESUMED = ("cur-lora", "full", "full, ZeRO-2")
REFUSED = ("corda", "osf")
COMMON = ["training.gradient_accumulation_steps=1", "training.max_steps=4", "training.save_steps=2"]


def main() -> None:
    recipe, result = sys.argv[-2], Path(sys.argv[-1])
    found: dict[str, str] = {}

    def run(method: str, stage: int, folder: str, *, resume: bool = False) -> str:
        options = [override(method), f"training.output_dir={folder}", *COMMON]
        loaded = load_recipe(recipe, [*options, f"training.deepspeed=zero{stage}.json"])
        try:
            return train(loaded, resume=resume).status
        except UserError as error:
            return str(error)

    for name, (method, stage) in CASES.items():
        found[name] = run(method, stage, name)
    for name in RESUMED:
        if int(os.environ["RANK"]) == 0:
            shutil.copytree(name, f"{name}-cut")
            shutil.rmtree(f"{name}-cut/checkpoints/step-000004")
            Path(f"{name}-cut/run.json").unlink()
        torch.distributed.barrier()
        found[f"{name}-cut"] = run(*CASES[name], f"{name}-cut", resume=True)
    for method in REFUSED:
        found[f"{method}-refused"] = run(method, 3, f"{method}-refused")
    if int(os.environ["RANK"]) == 0:
        result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    end_process(0)

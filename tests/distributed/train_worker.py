"""One rank of two that trains toy models under DeepSpeed in several ways; writes what happened as JSON.

Started by the deepspeed launcher: train_worker.py RECIPE RESULT. One launch for all, as starting costs most.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from secura_ds.errors import UserError
from secura_ds.ranks import end_process
from secura_ds.recipe import load_recipe
from secura_ds.training import RunSummary, callbacks, train

LORA = 'adapter={"method":"lora","rank":3,"target_modules":["q_proj"]}'
CONTRAST = [
    "adapter.selection=calibrated",
    "adapter.calibration.mode=contrast",
    "adapter.calibration.num_tokens=320",
    "adapter.init=orthonormal",
    "adapter.smagnorm.apply=forward",
]
CASES: dict[str, list[str]] = {
    "zero3": [],
    "zero2": ["training.deepspeed=zero2.json"],
    "forward": ["adapter.smagnorm.apply=forward"],
    "M1": ["adapter.strategy=M1"],
    "M1-twelve": ["adapter.strategy=M1", "training.gradient_accumulation_steps=3"],
    "lora": [LORA],
    "bf16": ["backbone.dtype=bfloat16"],
    "nf4": ["backbone.dtype=bfloat16", "backbone.quantization.kind=nf4"],
    "nf4-calibrated": [
        "backbone.dtype=bfloat16",
        "backbone.quantization.kind=nf4",
        "adapter.selection=calibrated",
        "adapter.calibration.num_tokens=320",
        "adapter.smagnorm.apply=forward",
    ],
    "checkpointing": ["training.gradient_checkpointing=true"],
    "checkpointing-forward": ["training.gradient_checkpointing=true", "adapter.smagnorm.apply=forward"],
    "validated": ["data.validation_fraction=0.25", "training.eval_steps=3"],
    "calibrated": ["adapter.selection=calibrated", "adapter.calibration.num_tokens=320"],
    "contrast": CONTRAST,
    "nf4-contrast": [*CONTRAST, "backbone.dtype=bfloat16", "backbone.quantization.kind=nf4"],
}
CONFIGURATIONS = sorted((Path(__file__).resolve().parents[2] / "recipes" / "deepspeed").glob("*.json"))
CASES |= {f"shipped {path.stem}": [f"training.deepspeed={path}"] for path in CONFIGURATIONS}
RESUMED = ("zero3", "zero2", "M1", "bf16")
COMMON = [
    "training.deepspeed=zero3.json",
    "training.gradient_accumulation_steps=1",
    "training.save_steps=4",
    "training.save_total_limit=3",
]


def main() -> None:
    recipe, result = sys.argv[-2], Path(sys.argv[-1])
    found: dict[str, Any] = {}

    def run(name: str, *options: str, resume: bool = False) -> RunSummary:
        return train(load_recipe(recipe, [f"training.output_dir={name}", *COMMON, *options]), resume=resume)

    for name, options in CASES.items():
        found[name] = run(name, *options).status
    for name in RESUMED:
        if int(os.environ["RANK"]) == 0:
            shutil.copytree(name, f"{name}-cut")
            shutil.rmtree(f"{name}-cut/checkpoints/step-000007")
            Path(f"{name}-cut/run.json").unlink()
        torch.distributed.barrier()
        found[f"{name}-cut"] = run(f"{name}-cut", *CASES[name], resume=True).status
    found["signal"] = interrupted_by_one_rank(run)
    found["reentrant"] = with_reentrant_checkpoints(run)
    found["whole"] = loaded_whole(run)
    if int(os.environ["RANK"]) == 0:
        result.write_text(json.dumps(found))


def interrupted_by_one_rank(run: Any) -> dict[str, Any]:
    """Only rank 1 gets the signal; both must stop after the same step."""
    original = callbacks.Agreement.on_step_end

    def send(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 3 and int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, args, state, control, **more)

    callbacks.Agreement.on_step_end = send  # type: ignore[method-assign]
    summary = run("signal")
    callbacks.Agreement.on_step_end = original  # type: ignore[method-assign]
    return {"status": summary.status, "steps": summary.steps, "signal": summary.signal}


def with_reentrant_checkpoints(run: Any) -> str:
    """The kind that older versions of DeepSpeed need."""
    from secura_ds.training import preflight

    version, preflight._installed_version = preflight._installed_version, lambda: "0.19.1"
    status: str = run("reentrant", "training.gradient_checkpointing=true").status
    preflight._installed_version = version
    return status


def loaded_whole(run: Any) -> str:
    """A model that was not partitioned as it loaded is refused, on both ranks."""
    from secura_ds.training import model

    def unpartitioned(*args: Any, **more: Any) -> Any:
        from transformers.integrations import deepspeed

        alive, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
        try:
            return load(*args, **more)
        finally:
            deepspeed._hf_deepspeed_config_weak_ref = alive

    load, model.load_model = model.load_model, unpartitioned
    try:
        run("whole")
    except UserError as error:
        return str(error)
    finally:
        model.load_model = load
    return "not refused"


if __name__ == "__main__":
    main()
    end_process(0)

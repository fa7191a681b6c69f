"""A toy backbone on disk, a toy data set and a recipe for them, for tests of training."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from calibration_toys import toy_llama, toy_tokenizer
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[1]
ZERO: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
    "steps_per_print": 1000000,
}

PAPER = {"method": "secura", "selection": "least", "calibration": {"mode": "null"}}
"""SECURA as published; with `selection` `"calibrated"` what looks at inputs alone."""


def write_toy(folder: Path, *, examples: int = 40) -> Path:
    """Backbone, data, DeepSpeed configurations and a recipe in `folder`; returns the recipe's path."""
    toy_llama(torch.float32).save_pretrained(folder / "backbone")
    toy_tokenizer().save_pretrained(folder / "backbone")
    rows = [
        {"prompt": f"add {i} {'and ' * (i % 5)}one", "completion": f"sum {i + 1}"} for i in range(examples)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stage in (2, 3):
        settings = json.loads(json.dumps(ZERO))
        settings["zero_optimization"]["stage"] = stage
        (folder / f"zero{stage}.json").write_text(json.dumps(settings))
    path = folder / "recipe.json"
    path.write_text(json.dumps(toy_recipe(), indent=1))
    return path


def toy_recipe() -> dict[str, Any]:
    return {
        "name": "toy",
        "backbone": {"model": "backbone", "dtype": "float32"},
        "adapter": PAPER | {"cur_rank": 7, "inner_rank": 9, "fold_every": 2},
        "data": {"sources": [{"path": "rows.jsonl"}], "max_length": 64},
        "training": {
            "output_dir": "run",
            "learning_rate": 1e-2,
            "max_steps": 7,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "warmup_ratio": 0.1,
            "report_to": [],
        },
    }


def launch(
    recipe: Path, *options: str, ranks: int = 0, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run launch/train.py in a fresh process, or by the deepspeed launcher on `ranks` CPU processes."""
    return subprocess.run(
        command(recipe, *options, ranks=ranks),
        cwd=cwd or recipe.parent,
        env=quiet_environment(**environment),
        capture_output=True,
        text=True,
        timeout=240,
    )


def command(recipe: Path, *options: str, ranks: int = 0, script: str = "train.py") -> list[str]:
    words = [str(REPOSITORY / "launch" / script), str(recipe), *options]
    if not ranks:
        return [sys.executable, *words]
    port = str(20000 + os.getpid() % 20000)
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--num_accelerators", str(ranks), "--master_port", port, *words]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def quiet_environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"} | {
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **more,
    }


def losses(run: Path) -> list[float]:
    """The losses of metrics.jsonl, one a logged step."""
    return [line["loss"] for line in lines(run / "metrics.jsonl") if "loss" in line]


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")

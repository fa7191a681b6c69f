"""Time of calibrating SmolLM2 and of creating its adapters, in one process. Goals: 60 s and 2 s.

python benchmarks/calibration.py --out calibration.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from secura_ds import SecuraConfig
from secura_ds.adapter import secura_layers
from secura_ds.calibration import calibrate
from secura_ds.embedded import embedded_checkpoint
from secura_ds.errors import run_command
from secura_ds.files import atomic_write_json
from secura_ds.report import format_table

TARGETS: dict[str, list[str] | str] = {"q, v": ["q_proj", "v_proj"], "all linear": "all-linear"}


def measure(targets: list[str] | str) -> dict[str, float]:
    """Seconds of calibration and of adapter creation, and how many layers got one."""
    folder = embedded_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = SecuraConfig(selection="calibrated", target_modules=targets)
    start = time.perf_counter()
    calibrate(model, AutoTokenizer.from_pretrained(folder), config)
    calibrated = time.perf_counter()
    adapted = get_peft_model(model, config)
    created = time.perf_counter()
    return {
        "layers": len(secura_layers(adapted)),
        "calibration_seconds": calibrated - start,
        "creation_seconds": created - calibrated,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(argv)
    rows = {name: measure(targets) for name, targets in TARGETS.items()}
    table = [
        [name, int(row["layers"]), f"{row['calibration_seconds']:.1f}", f"{row['creation_seconds']:.2f}"]
        for name, row in rows.items()
    ]
    print(format_table(["targets", "layers", "calibration s", "creation s"], table))
    if arguments.out:
        atomic_write_json(arguments.out, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))

"""Time of calibrating the quick start's model and of creating its adapters, in one process on one core.

Floor of mode "contrast": each token goes forward twice and backward once, 6 operations a weight; "null" runs
it forward once. Both write the text first, which is bound by reading the weights once a token.

    python benchmarks/calibration.py --out calibration.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import get_peft_model

from secura_ds import SecuraConfig
from secura_ds.adapter import secura_layers
from secura_ds.backbones import load_model, load_tokenizer
from secura_ds.calibration import calibrate
from secura_ds.data import build_datasets
from secura_ds.errors import run_command
from secura_ds.files import atomic_write_json
from secura_ds.recipe import load_recipe
from secura_ds.report import format_table

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "smollm2-135m.json"
TARGETS: dict[str, list[str] | str] = {"q, v": ["q_proj", "v_proj"], "all linear": "all-linear"}
MODES = ("null", "contrast")
NUM_TOKENS = 7680


def measure(targets: list[str] | str, mode: str) -> dict[str, float]:
    """Seconds of calibration and of adapter creation, and how many layers got one."""
    recipe = load_recipe(RECIPE)
    model, tokenizer = load_model(recipe.backbone), load_tokenizer(recipe.backbone)
    rows, _, _ = build_datasets(recipe, tokenizer)
    config = SecuraConfig(
        selection="calibrated",
        calibration={"mode": mode, "num_tokens": NUM_TOKENS},
        target_modules=targets,
    )
    start = time.perf_counter()
    calibrate(model, tokenizer, config, examples=rows.to_list() if mode == "contrast" else None)
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
    torch.set_num_threads(1)
    rows = {f"{mode}: {name}": measure(targets, mode) for mode in MODES for name, targets in TARGETS.items()}
    table = [
        [name, int(row["layers"]), f"{row['calibration_seconds']:.1f}", f"{row['creation_seconds']:.2f}"]
        for name, row in rows.items()
    ]
    print(format_table(["mode, targets", "layers", "calibration s", "creation s"], table))
    if arguments.out:
        atomic_write_json(arguments.out, {"num_tokens": NUM_TOKENS, **rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))

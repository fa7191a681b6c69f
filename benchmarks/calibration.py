"""Time of calibrating the quick start's model and of creating its adapters, in one process on one core.

Floor of mode "contrast": each token goes forward twice and backward once, 6 operations a weight; "null" runs
it forward once. Both write the text first, which is bound by reading the weights once a token.

Then what contrast takes for the directions of one wide layer, beside its passes: from moments (width, width),
in fp32, and from rows (tokens, width) of the task and of the text, in fp64. Floor of rows: three products, of
6 tokens^2 width operations in all.

    python benchmarks/calibration.py --out calibration.json
    python benchmarks/calibration.py --only-widths --device cuda --moments-up-to 18944
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from secura_ds import SecuraConfig
from secura_ds.adapter import secura_layers
from secura_ds.backbones import load_model, load_tokenizer
from secura_ds.calibration import calibrate
from secura_ds.data import build_datasets
from secura_ds.errors import run_command
from secura_ds.files import atomic_write_json
from secura_ds.method.contrast import contrast, contrast_of_rows
from secura_ds.recipe import load_recipe
from secura_ds.report import format_table

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "smollm2-135m.json"
TARGETS: dict[str, list[str] | str] = {"q, v": ["q_proj", "v_proj"], "all linear": "all-linear"}
MODES = ("null", "contrast")
NUM_TOKENS = 7680
WIDTHS = (4096, 8960, 14336, 18944)
ROWS, RANK = 3840, 128


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


def directions(width: int, device: torch.device, with_moments: bool) -> dict[str, float | None]:
    """Seconds for C or R of one layer, from rows and from moments of random vectors."""
    generator = torch.Generator(device).manual_seed(0)
    energies = torch.logspace(0, -3, width, device=device)
    task, general = (
        torch.randn(ROWS, width, generator=generator, device=device) * energies / ROWS**0.5 for _ in range(2)
    )
    of_rows = _seconds(lambda: contrast_of_rows(task, general, RANK), device)
    if not with_moments:
        return {"rows_seconds": of_rows, "moments_seconds": None}
    moments = task.T @ task, general.T @ general
    return {"rows_seconds": of_rows, "moments_seconds": _seconds(lambda: contrast(*moments, RANK), device)}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--only-widths", action="store_true", help="leave out the model")
    parser.add_argument("--device", default="cpu", help="where wide layers are computed")
    parser.add_argument("--moments-up-to", type=int, default=4096, help="wider layers from rows alone")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    if not arguments.only_widths:
        cases = [(mode, name) for mode in MODES for name in TARGETS]
        figures["models"] = {f"{mode}: {name}": measure(TARGETS[name], mode) for mode, name in cases}
        table = [
            [name, int(row["layers"]), f"{row['calibration_seconds']:.1f}", f"{row['creation_seconds']:.2f}"]
            for name, row in figures["models"].items()
        ]
        print(format_table(["mode, targets", "layers", "calibration s", "creation s"], table))
    device = torch.device(arguments.device)
    figures["layers"] = {w: directions(w, device, w <= arguments.moments_up_to) for w in WIDTHS}
    table = [
        [width, f"{row['rows_seconds']:.1f}", "" if (s := row["moments_seconds"]) is None else f"{s:.1f}"]
        for width, row in figures["layers"].items()
    ]
    print(format_table([f"width ({ROWS} tokens each)", "from rows s", "from moments s"], table))
    if arguments.out:
        atomic_write_json(arguments.out, {"num_tokens": NUM_TOKENS, "rows": ROWS, **figures})
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))

"""What saving costs at SmolLM2's size: seconds and bytes of a checkpoint, against writing those bytes alone.

Two runs of the embedded recipe on one process, with M2 and with M1 (whose checkpoints hold the folded
weights, too), save every few steps; each save is timed beside a plain write of as many bytes to that disk.
Goals: at most 2 s more than the plain write, at most 2 % of training time with a save every 50 steps.

    python benchmarks/checkpoint.py --out runs/checkpoint.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from secura_ds.errors import run_command
from secura_ds.files import atomic_write_json
from secura_ds.recipe import load_recipe
from secura_ds.report.table import format_table
from secura_ds.training import checkpoint as files
from secura_ds.training import train
from secura_ds.training.trainer import Trainer

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "smollm2-135m.json"
SECONDS_OVER_DISK, SHARE_LOST, INTERVAL = 2.0, 0.02, 50
STRATEGIES = ("M2", "M1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the status is 0 if both goals are met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--save-steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/checkpoint.json"))
    options = parser.parse_args(arguments)
    rows = [measure(strategy, options.steps, options.save_steps) for strategy in STRATEGIES]
    good = all(
        row["save_seconds"] <= row["plain_write_seconds"] + SECONDS_OVER_DISK
        and row["share_lost"] <= SHARE_LOST
        for row in rows
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    atomic_write_json(options.out, {"device": device, "interval": INTERVAL, "rows": rows, "good": good})
    print(table(rows))
    print("both goals are met" if good else "NOT as it should be")
    return 0 if good else 1


def measure(strategy: str, steps: int, save_steps: int) -> dict[str, Any]:
    """One run; the medians of its saves and steps."""
    saves: list[float] = []
    seconds: list[float] = []
    plain: list[float] = []
    save = Trainer._save_checkpoint

    def timed(self: Trainer, *args: Any, **more: Any) -> None:
        began = time.perf_counter()
        save(self, *args, **more)
        os.sync()  # what was left to the system counts, too
        saves.append(time.perf_counter() - began)
        seconds.append(self.total_seconds)
        newest = files.folder_of(self.checkpoints, self.state.global_step)
        plain.append(plain_write(newest.parent, size_of(newest)))

    with tempfile.TemporaryDirectory() as folder:
        values = [f"training.output_dir={folder}/run", f"training.max_steps={steps}"]
        values += ["backbone.dtype=bfloat16"]
        values += [
            f"training.save_steps={save_steps}",
            f"adapter.strategy={strategy}",
            "training.deepspeed=null",
        ]
        values += ["adapter.selection=least", "adapter.smagnorm.apply=merge", "adapter.fold_every=2"]
        Trainer._save_checkpoint = timed  # type: ignore[method-assign]
        try:
            summary = train(load_recipe(RECIPE, values))
        finally:
            Trainer._save_checkpoint = save  # type: ignore[method-assign]
        newest = files.latest(Path(folder) / "run" / "checkpoints")
        assert newest is not None
        folded = sum(path.stat().st_size for path in newest.glob("folded-*"))
        size = size_of(newest)
    step = seconds[-1] / summary.steps
    saving = statistics.median(saves)
    return {
        "strategy": strategy,
        "trainable_bytes": 4 * summary.trainable_parameters,
        "checkpoint_bytes": size - folded,
        "folded_bytes": folded,
        "save_seconds": round(saving, 3),
        "plain_write_seconds": round(statistics.median(plain), 3),
        "step_seconds": round(step, 3),
        "share_lost": round(saving / (INTERVAL * step), 5),
    }


def size_of(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def plain_write(folder: Path, size: int) -> float:
    """Seconds to have the disk hold `size` bytes in `folder`."""
    content, path = os.urandom(size), folder / "plain"
    began = time.perf_counter()
    with path.open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    taken = time.perf_counter() - began
    path.unlink()
    return taken


def table(rows: list[dict[str, Any]]) -> str:
    """The figures, one strategy a line."""
    headers = ["", "trained, MB", "checkpoint, MB", "folded, MB", "save, s", "plain write, s", "of 50 steps"]
    return format_table(
        headers,
        [
            [
                row["strategy"],
                f"{row['trainable_bytes'] / 1e6:.2f}",
                f"{row['checkpoint_bytes'] / 1e6:.2f}",
                f"{row['folded_bytes'] / 1e6:.1f}",
                f"{row['save_seconds']:.2f}",
                f"{row['plain_write_seconds']:.2f}",
                f"{row['share_lost']:.2%}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    sys.exit(run_command(main))

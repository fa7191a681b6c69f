"""One rank of two that runs task sequences under DeepSpeed, stage 3 and 2; writes what happened as JSON.

Started by the deepspeed launcher: continual_worker.py RECIPE RESULT. One launch for all: starting costs most.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from secura_ds.continual import run_sequences
from secura_ds.ranks import end_process
from secura_ds.recipe import load_sequence_recipe
from secura_ds.training import callbacks


def main() -> None:
    path, result = sys.argv[-2], Path(sys.argv[-1])

    def run(name: str, *options: str, **more: bool) -> Any:
        recipe = load_sequence_recipe(path, [f"output_dir={name}", *options])
        return run_sequences(recipe, **more)

    found: dict[str, Any] = {"memory": [], "tensors": []}
    for name, stage in (("zero3", 3), ("zero2", 2)):
        found[name] = run(name, f"training.deepspeed=zero{stage}.json").finished
        found["memory"].append(psutil.Process().memory_info().rss)
        found["tensors"].append(live_bytes())
    found["signals"] = interrupted_by_one_rank(run)
    if int(os.environ["RANK"]) == 0:
        result.write_text(json.dumps(found))


def live_bytes() -> int:
    """Bytes of all tensors that anything still refers to."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def interrupted_by_one_rank(run: Any) -> list[int | None]:
    """Only rank 1 gets the signal, in a measurement and in a step; both ranks must stop together."""
    original = callbacks.Signals.agreed
    calls = {"step": 0, "forward": 0}

    def agreed(signals: Any, device: Any, more: Any = ()) -> Any:
        kind = "step" if more else "forward"
        calls[kind] += 1
        if (kind, calls[kind]) in {("forward", 3), ("step", 5)} and int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(signals, device, more)

    callbacks.Signals.agreed = agreed  # type: ignore[method-assign]
    found = [run("signals", "training.deepspeed=zero3.json").signal]
    while found[-1] is not None and len(found) < 5:
        found.append(run("signals", "training.deepspeed=zero3.json", resume=True).signal)
    callbacks.Signals.agreed = original  # type: ignore[method-assign]
    return found


if __name__ == "__main__":
    main()
    end_process(0)

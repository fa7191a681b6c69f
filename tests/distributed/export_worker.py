"""One rank of two whose runs end with a merged checkpoint; writes what happened as JSON.

Started by the deepspeed launcher: export_worker.py RECIPE RESULT. One launch for all, as starting costs most.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import export_toys  # noqa: E402

from secura_ds import sharding  # noqa: E402
from secura_ds.errors import UserError  # noqa: E402
from secura_ds.merge import work  # noqa: E402
from secura_ds.ranks import end_process  # noqa: E402
from secura_ds.recipe import load_recipe  # noqa: E402
from secura_ds.training import RunSummary, train  # noqa: E402

CASES: dict[str, list[str]] = export_toys.CASES | {
    "fp32-M1": [*export_toys.CASES["fp32-M1"], "training.deepspeed=zero3-persistent.json"],
    "zero2": [*export_toys.CASES["fp32-M1"], "training.deepspeed=zero2.json"],
}
COMMON = ["training.deepspeed=zero3.json", "training.gradient_accumulation_steps=1"]


def main() -> None:
    recipe, result = sys.argv[-2], Path(sys.argv[-1])
    found: dict[str, Any] = {}

    def run(name: str, *options: str, resume: bool = False) -> RunSummary:
        settings = [f"training.output_dir={name}", *COMMON, *export_toys.COMMON, *options]
        return train(load_recipe(recipe, settings), resume=resume)

    for name, options in CASES.items():
        with watched() as most:
            found[name] = {"merged": run(name, *options).merged, **most}
    found["full"] = with_a_full_disk(run)
    found["signal"] = interrupted_by_one_rank(run)
    if int(os.environ["RANK"]) == 0:
        result.write_text(json.dumps(found))
    torch.distributed.barrier()


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """The most elements of weights that were whole at once on this rank in an export, and how many were."""
    from secura_ds.training import export

    most = {"whole": 0, "gathered": 0}
    gathered = export.sharding.gathered

    @contextmanager
    def counting(weight: torch.nn.Parameter) -> Iterator[None]:
        with gathered(weight):
            most["gathered"] += 1
            weights = [p for module in modules for p in module.parameters()]
            whole = sum(p.numel() for p in weights if sharding.is_sharded(p) and sharding.is_available(p))
            most["whole"] = max(most["whole"], whole)
            yield

    modules: list[torch.nn.Module] = []
    changed = export._changed_weights

    def remember(model: Any) -> dict[str, torch.nn.Module]:
        modules[:] = [model]
        return changed(model)

    # Only what `export` sees is replaced; the package itself stays as it is.
    patched = type(sys)("sharding")
    patched.__dict__.update(export.sharding.__dict__)
    patched.gathered = counting  # type: ignore[attr-defined]
    export.sharding, export._changed_weights = patched, remember  # type: ignore[assignment]
    try:
        yield most
    finally:
        export.sharding, export._changed_weights = sharding, changed


def refusal(action: Any) -> str:
    """The message of the UserError that `action` raises."""
    try:
        action()
    except UserError as error:
        return str(error)
    return "nothing was refused"


def with_a_full_disk(run: Any) -> dict[str, Any]:
    """The main rank alone meets a full disk in its third shard; both must stop, and a resumed run go on."""
    synced, fsync = [], work.os.fsync

    def fill(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith(".writing"):
            synced.append(handle)
            if len(synced) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    work.os.fsync = fill
    message = refusal(lambda: run("full"))
    work.os.fsync = fsync
    left = sorted(path.name for path in Path("full").iterdir())
    shards = len(list(Path("full/merged.partial").glob("*.safetensors")))
    messages: list[Any] = [None, None]
    torch.distributed.all_gather_object(messages, message)
    return {"messages": messages, "left": left, "shards": shards, "merged": run("full", resume=True).merged}


def interrupted_by_one_rank(run: Any) -> dict[str, Any]:
    """Only rank 1 gets the signal, in the middle of the export; both must stop there, and go on later."""
    from secura_ds.training import export

    agree, calls = export._LiveWeights._agree, []

    def send(self: Any, *index: int) -> int:
        calls.append(index)
        if len(calls) == 3 and int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return agree(self, *index)

    export._LiveWeights._agree = send  # type: ignore[method-assign]
    summary = run("signal")
    export._LiveWeights._agree = agree  # type: ignore[method-assign]
    resumed = run("signal", resume=True)
    return {
        "first": [summary.status, summary.signal, summary.merged],
        "then": [resumed.status, resumed.steps, resumed.merged],
    }


if __name__ == "__main__":
    main()
    end_process(0)

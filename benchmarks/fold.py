"""M1 fold of a Llama3.1-8B-shaped model on 1, 2 and 4 ranks under ZeRO-3: what is sent, held and how long.

Weights are random, in bf16, cut by DeepSpeed's `zero.Init`, and live only as the ranks' slices. In the same
run, in turn, each rank also times two floors over its slices: an in-place pass that reads and writes every
element once, and the matrix products that form D, in the fold's own blocks, once for max L and once for W+.
Times are those of the slowest rank, the best of several rounds. Exits with status 1 if a weight was gathered,
or if a slice is not, bit for bit, its part of the unsharded fold.

    python benchmarks/fold.py --out benchmarks/results/fold.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from secura_ds import sharding
from secura_ds.errors import UserError, run_command
from secura_ds.files import atomic_write_json
from secura_ds.method.cabr import block_elements, block_height, row_blocks, update_block
from secura_ds.ranks import end_process
from secura_ds.report.table import format_table

HIDDEN, INTERMEDIATE, KEYS = 4096, 14336, 1024
SHAPES = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (KEYS, HIDDEN),
    "v_proj": (KEYS, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
NUM_LAYERS = 32


class Traffic(TorchDispatchMode):
    """Bytes and number of the collectives inside the block, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = {"gathered": 0, "reduced": 0, "other": 0}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            kind = "reduced" if "reduce" in name else "gathered" if "gather" in name else "other"
            tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            self.bytes[kind] += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
            self.count += 1
        return func(*args, **(kwargs or {}))


def peak_memory(action: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that `action` holds at once beyond what was held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        action()
    found = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    deltas = [event.nbytes() for event in sorted(found, key=lambda event: event.start_ns())]
    return max(accumulate(deltas, initial=0))


def make_updates(shapes: Sequence[tuple[int, int]], rank: int) -> list[sharding.SliceUpdate]:
    """Weights cut by ZeRO-3, one after the other, each with an update of about 1 % of it."""
    import deepspeed

    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    device = torch.device(deepspeed.get_accelerator().current_device_name())
    noise = torch.randn(2**22 + 1, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    updates = []
    for i, (rows, columns) in enumerate(shapes):
        module = nn.Module()
        module.weight = nn.Parameter(0.02 * _filled(noise, rows, columns), requires_grad=False)
        deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(i)
        core = (torch.randn(rank, rank, generator=generator) / rank).to(device)
        C, R = (0.02 * _filled(noise, *shape).to(device) for shape in ((rows, rank), (rank, columns)))
        updates.append(sharding.SliceUpdate(module.weight, C, core, R, 0.5, sharding.Restraint()))
    return updates


def _filled(noise: Tensor, rows: int, columns: int) -> Tensor:
    """Noise of any size, from a stretch that divides no row."""
    return noise.repeat(-(-rows * columns // len(noise)))[: rows * columns].view(rows, columns)


def pass_over(updates: Sequence[sharding.SliceUpdate]) -> None:
    """Read and write every element of the slices once, in place."""
    for update in updates:
        update.weight.ds_tensor.mul_(1.0)


def products(updates: Sequence[sharding.SliceUpdate]) -> None:
    """The matrix products of a fold alone: every block of D that a slice touches, twice."""
    for update in updates:
        piece = sharding.local_slice(update.weight)
        rows, columns = piece.shape
        R, elements = update.R.float(), block_elements(update.C.device)
        out = torch.empty(min(rows, block_height(columns, elements)), columns, device=R.device)
        for _ in range(2):
            for block in row_blocks(rows, columns, elements):
                if block.start * columns < piece.end and block.stop * columns > piece.start:
                    height = min(block.stop, rows) - block.start
                    update_block(update.C, update.core, R, update.scaling, block, out=out[:height])


def timed(action: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds and processor seconds of the slowest rank, all beginning together."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    dist.barrier()
    start, processor = time.perf_counter(), time.process_time()
    action()
    synchronize()
    spent = torch.tensor([time.perf_counter() - start, time.process_time() - processor], device=device)
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return float(spent[0]), float(spent[1])


def equals_unsharded(update: sharding.SliceUpdate) -> bool:
    """Fold one weight sharded and, from a gathered copy, whole; whether every rank has its part of it."""
    weight = sharding.whole(update.weight).to(update.C.device)
    sharding.fold_slices([update])
    sharding.fold_slices([update._replace(weight=weight)])
    piece = sharding.local_slice(update.weight)
    own = piece.read(piece.start, piece.end, torch.empty(0, dtype=weight.dtype, device=weight.device))
    equal = torch.tensor(
        torch.equal(own, weight.flatten()[piece.start : piece.end]), device=weight.device
    ).int()
    dist.all_reduce(equal, dist.ReduceOp.MIN)
    return bool(equal)


def work(shapes: Sequence[tuple[int, int]], rank: int, rounds: int) -> dict[str, Any]:
    """What one rank measures; the numbers of rank 0, times of the slowest."""
    import deepspeed

    deepspeed.init_distributed(verbose=False)
    updates = make_updates(shapes, rank)
    device = updates[0].C.device
    equal = equals_unsharded(min(updates, key=lambda update: len(update.C)))
    with Traffic() as traffic:
        sharding.fold_slices(updates)
    peak = peak_memory(lambda: sharding.fold_slices(updates), device)
    actions = {"pass": pass_over, "products": products, "fold": sharding.fold_slices}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            spent[name].append(timed(lambda action=action: action(updates), device))  # type: ignore[misc]
    slices = sum(update.weight.ds_tensor.numel() for update in updates)
    best = [{name: min(times[i] for times in spent[name]) for name in actions} for i in range(2)]
    # Processor seconds tell the work apart from a busy machine, but do not count an accelerator's.
    counted = best[device.type == "cpu"]
    return {
        "ranks": dist.get_world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "slice_bytes_per_rank": 2 * slices,
        "bytes": traffic.bytes,
        "collectives": traffic.count,
        "peak_extra_bytes": peak,
        "equals_unsharded": equal,
        "seconds": best[0],
        "processor_seconds": best[1],
        "times_the_pass": counted["fold"] / counted["pass"],
        "times_the_products": counted["fold"] / counted["products"],
        "times_both": counted["fold"] / (counted["pass"] + counted["products"]),
        "gigaflops_of_products": 4e-9 * rank * slices / counted["products"],
    }


def launch(ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run `work` on that many processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += [__file__, "--work", str(out), "--targets", ",".join(options.targets)]
        command += [
            "--layers",
            str(options.layers),
            "--rank",
            str(options.rank),
            "--rounds",
            str(options.rounds),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise UserError(f"{ranks} ranks stopped: {done.stdout.strip().splitlines()[-1]}")
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def check_memory(num_elements: int) -> None:
    """Refuse what this machine's memory cannot hold: the slices, a weight on each rank, and the processes."""
    needed = 2 * num_elements + 4 * 2 * INTERMEDIATE * HIDDEN + 4 * 2**30
    available = psutil.virtual_memory().available
    if needed > available and not torch.cuda.is_available():
        raise UserError(
            f"the slices need about {needed / 2**30:.0f} GiB, but {available / 2**30:.0f} GiB are free: "
            "give fewer --layers or --targets"
        )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The measurement as plain text."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "ranks": lambda row: str(row["ranks"]),
        "slices MiB": lambda row: f"{row['slice_bytes_per_rank'] / 2**20:.0f}",
        "gathered B": lambda row: str(row["bytes"]["gathered"]),
        "reduced B": lambda row: str(row["bytes"]["reduced"]),
        "calls": lambda row: str(row["collectives"]),
        "extra MiB": lambda row: f"{row['peak_extra_bytes'] / 2**20:.1f}",
        "fold s": lambda row: f"{row['seconds']['fold']:.2f}",
        "x pass": lambda row: f"{row['times_the_pass']:.1f}",
        "x products": lambda row: f"{row['times_the_products']:.2f}",
        "x both": lambda row: f"{row['times_both']:.2f}",
        "GFLOP/s": lambda row: f"{row['gigaflops_of_products']:.0f}",
    }
    return format_table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure for every number of ranks, print the table and write the JSON."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/fold.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", default="q_proj,v_proj", help="comma-separated names, or all-linear")
    parser.add_argument("--layers", type=int, help=f"default {NUM_LAYERS}, with --quick 4")
    parser.add_argument("--rank", type=int, default=64, help="cur_rank of the updates")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="four layers")
    parser.add_argument("--out", type=Path, default=Path("runs/fold.json"))
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.layers = options.layers or (4 if options.quick else NUM_LAYERS)
    options.targets = list(SHAPES) if options.targets == "all-linear" else options.targets.split(",")
    if unknown := [name for name in options.targets if name not in SHAPES]:
        raise UserError(f"--targets has {unknown[0]!r}: one or more of {', '.join(SHAPES)}, or all-linear")
    shapes = [SHAPES[name] for _ in range(options.layers) for name in options.targets]
    if options.work:
        found = work(shapes, options.rank, options.rounds)
        if dist.get_rank() == 0:
            options.work.write_text(json.dumps(found))
        dist.barrier()
        end_process(0)
    num_elements = sum(rows * columns for rows, columns in shapes)
    check_memory(num_elements)
    rows = [launch(ranks, options) for ranks in options.ranks]
    settings = {
        "targets": options.targets,
        "layers": options.layers,
        "rank": options.rank,
        "rounds": options.rounds,
    }
    machine = {"cores": len(os.sched_getaffinity(0)), "device": rows[0]["device"]}
    atomic_write_json(
        options.out, {"settings": settings, "machine": machine, "weights": len(shapes), "rows": rows}
    )
    print(
        f"{len(shapes)} weights ({', '.join(options.targets)} of {options.layers} layers), "
        f"{2e-9 * num_elements:.2f} GB in bf16, rank {options.rank}, on {machine['cores']} cores"
    )
    print(table(rows))
    good = all(row["bytes"]["gathered"] == 0 and row["equals_unsharded"] for row in rows)
    print(
        "nothing was gathered; slices equal the unsharded fold bit for bit" if good else "NOT as it should be"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(run_command(main))

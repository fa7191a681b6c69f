"""Say before a run what it will take: memory by part, traffic, files, and whether it fits.

    python launch/plan.py recipes/llama3-8b.json --gpus 4 --gpu-memory 24

Needs the model's configuration, no weights and no GPU. Without --gpus it plans for the devices of this
machine. Of task sequences it plans a task of each entry. Exit status 1: it does not fit.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import secura_ds  # noqa: F401 - registers our adapter with PEFT
from secura_ds.backbones import load_config
from secura_ds.continual.stage import entry_recipes
from secura_ds.errors import UserError, run_command
from secura_ds.files import atomic_write_json
from secura_ds.plan import Change, Devices, Plan, Verdict, advice, here, judge, plan
from secura_ds.plan.traffic import LINK, seconds
from secura_ds.recipe import Recipe, describes_sequences, load_recipe, load_sequence_recipe
from secura_ds.report.plan import plan_table

GIB = 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, plan, print the table and write the document."""
    options = _parser().parse_args(arguments)
    # Libraries tell each other what will change; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    devices = _devices(options)
    if describes_sequences(options.recipe):
        sequences = load_sequence_recipe(options.recipe, options.set)
        documents = {}
        for entry, recipe in entry_recipes(sequences, Path(sequences.output_dir)):
            print(f"entry {entry.name}")
            documents[entry.name] = _plan(recipe, devices, options)
        found: dict[str, Any] = {"entries": documents}
    else:
        found = _plan(load_recipe(options.recipe, options.set), devices, options)
        documents = {"": found}
    if options.json is not None:
        atomic_write_json(options.json, found)
        print(f"written: {options.json}")
    return 0 if all(one["verdict"]["fits"] for one in documents.values()) else 1


def _plan(recipe: Recipe, devices: Devices, options: argparse.Namespace) -> dict[str, Any]:
    """Plan one run, and print its table; the document of --json."""
    config = load_config(recipe.backbone)
    planned = plan(recipe, config, ranks=devices.ranks, device=devices.kind, nodes=devices.nodes)
    reserve = None if options.reserve is None else round(options.reserve * GIB)
    verdict = judge(planned, devices, reserve=reserve)
    changes = [] if verdict.fits else advice(recipe, config, planned, devices, reserve=reserve)
    print(plan_table(planned, verdict, changes, link=options.link))
    return document(planned, verdict, changes, options.link)


def document(planned: Plan, verdict: Verdict, changes: Sequence[Change], link: float) -> dict[str, Any]:
    """What --json writes of a run: bytes throughout, and seconds for `communication_seconds`."""
    return {
        "plan": planned.to_dict(),
        "verdict": {
            **asdict(verdict),
            "excess": verdict.excess,
            "host_excess": verdict.host_excess,
            "fits": verdict.fits,
        },
        "changes": [change._asdict() for change in changes],
        "link_gb_per_second": link,
        "communication_seconds": seconds(planned.traffic, link),
    }


def _devices(options: argparse.Namespace) -> Devices:
    """The machine that the options describe; what they leave out is this one's."""
    for name in ("gpus", "nodes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: at least 1")
    for name in ("gpu_memory", "host_memory", "link"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {value:g}: more than 0")
    memory = None if options.gpu_memory is None else round(options.gpu_memory * GIB)
    host = None if options.host_memory is None else round(options.host_memory * GIB)
    if options.gpus is None:
        if options.gpu_memory is not None:
            raise UserError("--gpu-memory is given without --gpus: say how many GPUs there are")
        own = here(per_node=max(1, torch.cuda.device_count()), nodes=options.nodes)
        return Devices(own.kind, own.per_node, own.nodes, own.memory, host or own.host_memory)
    if options.gpus % options.nodes:
        raise UserError(f"--gpus is {options.gpus}, --nodes {options.nodes}: the same number on each node")
    return Devices("cuda", options.gpus // options.nodes, options.nodes, memory, host)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="the recipe, a JSON file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="override a value of the recipe; repeatable",
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs in all (default: this machine's devices)")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of each GPU in GiB")
    parser.add_argument("--host-memory", type=float, metavar="GIB", help="main memory of each node in GiB")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    parser.add_argument(
        "--reserve",
        type=float,
        metavar="GIB",
        help="GiB of each device left to CUDA's context, NCCL and fragmentation (default 1 on a GPU)",
    )
    parser.add_argument(
        "--link",
        type=float,
        default=LINK,
        metavar="GB/s",
        help=f"bandwidth between ranks (default {LINK:g}: PCIe 4.0 x16 without NVLink)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))

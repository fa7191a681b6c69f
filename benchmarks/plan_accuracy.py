"""How right the plan is: its bytes against those counted in real runs, part by part and at the step's peak.

Runs `secura_ds.training.train` on toys and on SmolLM2, in one process and on two ranks under DeepSpeed, and
counts what is allocated (`allocations.py`). Prints predicted, measured and their ratio; goal: within 10 %.

    python benchmarks/plan_accuracy.py              everything, about half an hour on two cores
    python benchmarks/plan_accuracy.py --quick      toys only, about two minutes
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from allocations import Counter, Measured, addresses
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from secura_ds import environment
from secura_ds.backbones import load_config
from secura_ds.embedded import embedded_checkpoint
from secura_ds.errors import run_command
from secura_ds.files import atomic_write_json
from secura_ds.plan import Plan, deepspeed_file, plan
from secura_ds.ranks import end_process
from secura_ds.recipe import load_recipe
from secura_ds.report.table import format_table
from secura_ds.training import run as runs
from secura_ds.training import train

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "recipes" / "smollm2-135m.json"
RESULT = HERE / "results" / "plan_accuracy.json"
GOAL = 0.1
WITHIN_A_STEP = ("gathered_weights", "activations", "logits_and_loss", "backward_buckets")

CHECKPOINTING = "training.gradient_checkpointing=true"
MERGE = "adapter.smagnorm.apply=merge"
ALL = "adapter.target_modules=all-linear"
NF4 = "backbone.quantization.kind=nf4"
EAGER = "backbone.attention=eager"
LORA = 'adapter={"method":"lora","rank":16,"target_modules":"all-linear"}'
SHIPPED = "deepspeed/"
ALONE = "training.deepspeed=null"
ZERO2 = f"training.deepspeed={SHIPPED}zero2.json"
COMMON = [
    f"training.deepspeed={SHIPPED}zero3.json",
    "adapter.selection=least",
    "backbone.attention=sdpa",
    "training.micro_batch_size=2",
    "training.max_steps=3",
    "backbone.dtype=bfloat16",
    "training.report_to=[]",
]
CASES: dict[str, tuple[int, list[str]]] = {
    "ZeRO-3, forward": (2, []),
    "ZeRO-3, forward, eager attention": (2, [EAGER]),
    "ZeRO-3, forward, checkpointing": (2, [CHECKPOINTING]),
    "ZeRO-3, merge, all linear": (2, [MERGE, ALL]),
    "ZeRO-3, merge, all linear, checkpointing": (2, [MERGE, ALL, CHECKPOINTING]),
    "ZeRO-3, NF4, checkpointing": (2, [NF4, CHECKPOINTING]),
    "ZeRO-3, accumulating": (2, [MERGE, "training.gradient_accumulation_steps=2"]),
    "ZeRO-2, checkpointing": (2, [ZERO2, CHECKPOINTING]),
    "ZeRO-3, LoRA": (2, [LORA]),
    "one process, merge": (1, [ALONE, MERGE]),
    "one process, NF4": (1, [ALONE, NF4]),
    "one process, LoRA, checkpointing": (1, [ALONE, LORA, CHECKPOINTING]),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every case, print the comparison and write it."""
    options = _parser().parse_args(arguments)
    if options.worker:
        _work(Path(options.worker[0]), Path(options.worker[1]), json.loads(options.worker[2]))
        return 0
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sizes = {"toy": (str(write_toy(folder / "toy")), scaled_configurations(folder))}
        if not options.quick:
            sizes["SmolLM2 135M"] = ("embedded:smollm2-135m", SHIPPED)
        for size, (backbone, configurations) in sizes.items():
            for ranks in (2, 1):
                cases = {
                    name: [
                        f"backbone.model={backbone}",
                        *(text.replace(SHIPPED, configurations) for text in (*COMMON, *extra)),
                    ]
                    for name, (wanted, extra) in CASES.items()
                    if wanted == ranks and (not options.only or options.only in name)
                }
                found = measure(RECIPE, cases, ranks=ranks, folder=folder / f"{ranks}") if cases else {}
                found = json.loads(json.dumps(found).replace(backbone, size))  # no folder of this machine
                rows += [{"size": size, "case": name, "ranks": ranks, **row} for name, row in found.items()]
    print(_table(rows))
    if options.out is not None:
        atomic_write_json(options.out, {"goal": GOAL, "torch": torch.__version__, "cases": rows})
    worst = max(abs(row["ratio"] - 1) for row in rows)
    print(f"worst ratio is {worst:.1%} off; goal: {GOAL:.0%}")
    return 0 if worst <= GOAL else 1


def measure(
    recipe: Path, cases: dict[str, list[str]], *, ranks: int, folder: Path, port: int = 29517
) -> dict[str, dict[str, Any]]:
    """Run each case (overrides of `recipe`) for three steps on `ranks` CPU processes, and compare.

    Returns:
        by case: `predicted` and `measured` bytes at the step's peak, their `ratio`, and both by part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / f"measured-{ranks}.json"
    result.unlink(missing_ok=True)
    worker = [str(HERE / "plan_accuracy.py"), "--worker", str(recipe), str(result), json.dumps(cases)]
    command = [sys.executable, *worker]
    if ranks > 1:
        launcher = str(Path(sys.executable).parent / "deepspeed")
        command = [launcher, "--num_accelerators", str(ranks), "--master_port", str(port), *worker]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    if not result.is_file():
        raise RuntimeError(f"{command} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    found: dict[str, dict[str, Any]] = json.loads(result.read_text(encoding="utf-8"))
    return found


def _work(recipe: Path, result: Path, cases: dict[str, list[str]]) -> None:
    """In each launched process: train every case with a counter, and compare on the main process."""
    found = {}
    for name, options in cases.items():
        counter = counted(recipe, [*options, f"training.output_dir={result.parent / 'run'}"])
        loaded = load_recipe(recipe, options)
        ranks = environment.world_size()
        planned = plan(
            loaded,
            load_config(loaded.backbone),
            ranks=ranks,
            device="cpu",
            settings=deepspeed_file(loaded) if ranks > 1 else None,
            work=counter.measured.work,
        )
        found[name] = compare(planned, counter.measured)
    if environment.is_main_process():
        atomic_write_json(result, found)
    end_process(0)


def counted(recipe: Path, options: list[str]) -> Counter:
    """Train with a counter among the callbacks."""
    counters: list[Counter] = []
    before, add = addresses(), runs._add_callbacks

    def add_counter(trainer: Any, *more: Any) -> Any:
        agreement = add(trainer, *more)
        counters.append(Counter(trainer, before))
        trainer.add_callback(counters[0])
        return agreement

    with mock.patch.object(runs, "_add_callbacks", add_counter):
        train(load_recipe(recipe, options), overwrite=True)
    return counters[0]


def compare(planned: Plan, measured: Measured) -> dict[str, Any]:
    """A plan beside what was counted, in bytes."""
    at_rest = {part: size for part, size in planned.parts.items() if part not in WITHIN_A_STEP}
    assert measured.work is not None
    return {
        "work": measured.work._asdict(),
        "predicted": planned.step_bytes,
        "measured": measured.step_peak,
        "ratio": planned.step_bytes / measured.step_peak,
        "at_rest": {"predicted": sum(at_rest.values()), "measured": measured.held},
        "parts": {
            part: {"predicted": at_rest.get(part, 0), "measured": measured.at_rest.get(part, 0)}
            for part in {**at_rest, **measured.at_rest}
        },
        "within_a_step": {part: planned.parts[part] for part in WITHIN_A_STEP},
        "plan": asdict(planned),
    }


def write_toy(folder: Path) -> Path:
    """A checkpoint with SmolLM2's tokenizer and a narrow model of random weights."""
    source = embedded_checkpoint("smollm2-135m")
    config = AutoConfig.from_pretrained(source)
    for name, value in (
        ("hidden_size", 192),
        ("intermediate_size", 512),
        ("num_hidden_layers", 6),
        ("num_attention_heads", 6),
        ("num_key_value_heads", 3),
        ("head_dim", 32),
    ):
        setattr(config, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def scaled_configurations(folder: Path) -> str:
    """The shipped DeepSpeed configurations with a reduce bucket of a toy's size; else it is all one sees."""
    (folder / "deepspeed").mkdir(parents=True)
    for source in (RECIPE.parent / "deepspeed").glob("zero*.json"):
        settings = json.loads(source.read_text(encoding="utf-8"))
        settings["zero_optimization"] |= {"reduce_bucket_size": 500_000}
        atomic_write_json(folder / "deepspeed" / source.name, settings)
    return f"{folder}/deepspeed/"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    def mebi(size: float) -> str:
        return f"{size / 2**20:.2f}"

    return format_table(
        ("size", "case", "at rest: predicted", "measured", "at the peak: predicted", "measured", "ratio"),
        [
            (
                row["size"],
                row["case"],
                mebi(row["at_rest"]["predicted"]),
                mebi(row["at_rest"]["measured"]),
                mebi(row["predicted"]),
                mebi(row["measured"]),
                f"{row['ratio']:.3f}",
            )
            for row in rows
        ],
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/plan_accuracy.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="toys only")
    parser.add_argument("--only", metavar="TEXT", help="only cases whose name has TEXT")
    parser.add_argument("--out", type=Path, default=RESULT, metavar="FILE", help="where the JSON goes")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))

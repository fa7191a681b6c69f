"""Speed and memory of 7B-8B backbones at true shape on one CUDA GPU: SECURA against PEFT LoRA and DoRA.

Weights are random (no download, no account); everything else is what a user's run does: the recipe, our
Trainer, its loss, gradient checkpointing, the optimizer. Contenders follow each other in one process, on one
copy of the backbone, with trainable parameters that come nearest to SECURA's. Without a CUDA GPU it says so
and exits with 0.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --quick       toy shapes, on a CPU too: shows that the script works, nothing else

Model FLOP utilisation counts what the method needs, not what is recomputed: with frozen weights 4 FLOP per
weight and token (forward, and the gradient of each layer's input), and 12 per query-key pair and channel of
attention (two products forward, four backward), half of the pairs being masked. It is relative to the card's
dense bf16 rate by its data sheet and, as a check, to that of a large matrix product in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from random_backbone import random_backbone, random_tokens, shape_of, tokenizer_of
from transformers import PreTrainedConfig, PreTrainedModel, PrinterCallback, TrainerCallback

from secura_ds import sharding
from secura_ds.backbones.adapter import adapter_config
from secura_ds.environment import describe_environment
from secura_ds.errors import run_command
from secura_ds.files import atomic_write_json
from secura_ds.plan import plan
from secura_ds.recipe import Recipe, load_recipe
from secura_ds.report.table import format_table
from secura_ds.training.arguments import make_arguments
from secura_ds.training.model import trainable
from secura_ds.training.trainer import Trainer

RECIPES = {"qwen2-7b": "qlora/qwen2-7b.json", "llama3.1-8b": "qlora/llama3.1-8b.json"}
FOLDER = Path(__file__).resolve().parents[1] / "recipes"
GIB = 2**30

# Dense bf16 FLOP per second, from the cards' data sheets.
PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
# torchtune's published figure for QLoRA of Llama3 8B at batch 2 on a 24 GB card, and ours with offloading.
MEMORY_GOAL, OFFLOAD_GOAL = 7.4, 6.5
REFERENCE = "lora"


def contenders(arguments: argparse.Namespace, lora_rank: int) -> dict[str, list[str]]:
    """The recipe overrides of each contender, by name."""

    def secura(apply: str) -> list[str]:
        # Only the factors' values differ from a calibrated run, not their shapes.
        settings = {
            "method": "secura",
            "selection": "least",
            "cur_rank": arguments.cur_rank,
            "inner_rank": arguments.inner_rank,
            "smagnorm": {"apply": apply, "eps_relative": 1.0},
            "target_modules": arguments.targets,
        }
        return [f"adapter={json.dumps(settings)}"]

    def lora(method: str) -> list[str]:
        settings = {
            "method": method,
            "rank": lora_rank,
            "alpha": 2.0 * lora_rank,
            "target_modules": arguments.targets,
        }
        return [f"adapter={json.dumps(settings)}"]

    return {
        REFERENCE: lora("lora"),
        "dora": lora("dora"),
        "secura, merge": secura("merge"),
        "secura, forward": secura("forward"),
    }


class StepClock(TrainerCallback):
    """Seconds of each optimizer step, waiting for the device at both ends."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        synchronize()
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop it."""
        synchronize()
        self.seconds.append(time.perf_counter() - self._began)


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(recipe: Recipe, base: PreTrainedModel, warmup: int) -> dict[str, Any]:
    """Train the recipe's adapter on `base` for a few steps; the base is as it was afterwards."""
    config = base.config
    torch.manual_seed(0)
    model: PeftModel = get_peft_model(base, adapter_config(recipe, base))
    model.enable_input_require_grads()
    parameters = sum(p.numel() for p in trainable(model).values())
    steps, batch = recipe.training.max_steps or 0, recipe.training.micro_batch_size
    with tempfile.TemporaryDirectory() as folder:
        arguments = make_arguments(recipe, Path(folder), None)
        rows = random_tokens(config.vocab_size, steps * batch, recipe.data.max_length)
        trainer = Trainer(
            model,
            arguments,
            tokenizer_of(),
            rows,
            None,
            checkpoints=Path(folder),
            keep=1,
            reentrant=False,
        )
        trainer.remove_callback(PrinterCallback)
        trainer._save_checkpoint = lambda *_, **__: None  # type: ignore[method-assign]
        clock = StepClock()
        trainer.add_callback(clock)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        outcome = trainer.train()
    seconds = clock.seconds[warmup:]
    tokens = batch * recipe.data.max_length
    result = {
        "trainable_parameters": parameters,
        "median_step_seconds": statistics.median(seconds),
        "tokens_per_second": tokens / statistics.median(seconds),
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "loss": float(outcome.training_loss),
    }
    del trainer
    model.unload()
    return result


def flops_per_token(config: PreTrainedConfig, weights: int, length: int) -> float:
    """FLOP that one token needs in a step whose weights are frozen; see the top of the file.

    Args:
        weights: parameters of the model without the input embedding.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    channels = config.num_hidden_layers * config.num_attention_heads * head
    return 4.0 * weights + 12.0 * channels * length / 2


def matmul_rate(size: int = 8192, repeats: int = 20) -> float:
    """FLOP per second of a bf16 product of two large matrices."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        left @ right
    synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - began)


def peak_flops() -> float | None:
    """The card's dense bf16 rate; None for a card that is not in the table."""
    name = torch.cuda.get_device_name()
    return next((rate for card, rate in PEAK_FLOPS.items() if card in name), None)


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int, bool]]:
    """Backbone, kind of weights, micro-batch, offloading of activations."""
    for backbone in arguments.backbones:
        for kind in arguments.weights:
            for batch in arguments.batches:
                yield backbone, kind, batch, False
            if torch.cuda.is_available() and 2 in arguments.batches:
                yield backbone, kind, 2, True


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each case and contender."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matmul_rate() if torch.cuda.is_available() else None
    rows: list[dict[str, Any]] = []
    held: tuple[str, str] | None = None
    base: PreTrainedModel | None = None
    for backbone, kind, batch, offload in cases(arguments):
        recipe = recipe_of(backbone, kind, batch, offload, arguments, [])
        if held != (backbone, kind):
            base = None
            free()
            config = shape_of(recipe, quick=arguments.quick)
            base, held = random_backbone(recipe, config, device), (backbone, kind)
        assert base is not None
        lora_rank = equal_lora_rank(base, arguments)
        for name, adapter in contenders(arguments, lora_rank).items():
            recipe = recipe_of(backbone, kind, batch, offload, arguments, adapter)
            row = {"backbone": backbone, "weights": kind, "batch": batch, "offload": offload, "method": name}
            rows.append(row | attempt(recipe, base, arguments.warmup, rate))
            free()
            print(json.dumps(rows[-1]), flush=True)
    return rows


def attempt(recipe: Recipe, base: PreTrainedModel, warmup: int, rate: float | None) -> dict[str, Any]:
    """The measured figures of one contender, or that it did not fit."""
    planned = plan(recipe, base.config, device=base.device.type).step_bytes
    try:
        row = run(recipe, base, warmup)
    except torch.OutOfMemoryError as error:
        return {"planned_bytes": planned, "error": str(error).splitlines()[0]}
    weights = sum(
        (m.weight.quant_state.shape.numel() if sharding.is_quantized(m) else m.weight.numel())
        for m in base.modules()
        if isinstance(getattr(m, "weight", None), torch.nn.Parameter)
        and not isinstance(m, torch.nn.Embedding)
    )
    needed = flops_per_token(base.config, weights, recipe.data.max_length) * row["tokens_per_second"]
    peak = peak_flops() if torch.cuda.is_available() else None
    return row | {
        "planned_bytes": planned,
        "planned_to_measured": planned / row["peak_bytes"] if row["peak_bytes"] else None,
        "flop_utilisation": needed / peak if peak else None,
        "share_of_matmul_rate": needed / rate if rate else None,
    }


def recipe_of(
    backbone: str, kind: str, batch: int, offload: bool, arguments: argparse.Namespace, adapter: list[str]
) -> Recipe:
    """A shipped recipe with this benchmark's length, batch and number of steps."""
    changes = [
        f"data.max_length={arguments.length}",
        f"training.micro_batch_size={batch}",
        "training.gradient_accumulation_steps=1",
        f"training.max_steps={arguments.warmup + arguments.steps}",
        "training.epochs=null",
        f"training.activation_offloading={json.dumps(offload)}",
        "training.report_to=[]",
        "training.logging_steps=1000",
        "training.warmup_ratio=0",
        *(["backbone.quantization=null"] if kind == "bf16" else []),
    ]
    return load_recipe(FOLDER / RECIPES[backbone], [*changes, *adapter])


def equal_lora_rank(model: PreTrainedModel, arguments: argparse.Namespace) -> int:
    """The LoRA rank whose trainable parameters come nearest to SECURA's."""
    layers = [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in arguments.targets]
    per_rank = sum(layer.in_features + layer.out_features for layer in layers)
    return max(1, round(2 * arguments.cur_rank * arguments.inner_rank * len(layers) / per_rank))


def free() -> None:
    """Give back what earlier runs held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def goals(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures this benchmark is about, worst case over all shapes and batches; None where not run."""
    measured = [row for row in rows if "error" not in row]

    def slowest(method: str, other: str) -> float | None:
        speeds = {(r["backbone"], r["weights"], r["batch"], r["offload"], r["method"]): r for r in measured}
        ratios = [
            row["tokens_per_second"] / speeds[(*key[:4], other)]["tokens_per_second"]
            for key, row in speeds.items()
            if key[4] == method and (*key[:4], other) in speeds
        ]
        return min(ratios, default=None)

    def memory(offload: bool) -> float | None:
        found = [
            row["peak_bytes"] / GIB
            for row in measured
            if (row["backbone"], row["weights"], row["batch"], row["offload"])
            == ("llama3.1-8b", "nf4", 2, offload)
            and row["method"] == "secura, forward"
            and row["peak_bytes"]
        ]
        return found[0] if found else None

    planned = [r["planned_to_measured"] for r in measured if r.get("planned_to_measured")]
    return {
        "merge_to_lora": {"goal": "at least 0.97", "measured": slowest("secura, merge", REFERENCE)},
        "forward_to_lora": {"goal": "at least 0.75", "measured": slowest("secura, forward", REFERENCE)},
        "merge_to_dora": {"goal": "above 1", "measured": slowest("secura, merge", "dora")},
        "forward_to_dora": {"goal": "above 1", "measured": slowest("secura, forward", "dora")},
        "nf4_8b_batch_2_gib": {"goal": f"at most {MEMORY_GOAL}", "measured": memory(False)},
        "nf4_8b_batch_2_offload_gib": {"goal": f"at most {OFFLOAD_GOAL}", "measured": memory(True)},
        "planned_to_measured": {
            "goal": "0.9 to 1.1",
            "measured": [min(planned), max(planned)] if planned else None,
        },
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--weights", nargs="+", choices=["bf16", "nf4"], default=["bf16", "nf4"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"])
    parser.add_argument("--cur-rank", type=int, default=64)
    parser.add_argument("--inner-rank", type=int, default=96)
    parser.add_argument("--quick", action="store_true", help="toy shapes and short runs, on a CPU too")
    parser.add_argument("--out", type=Path)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    arguments = _parser().parse_args(argv)
    if not torch.cuda.is_available() and not arguments.quick:
        print("skipped: no CUDA GPU here (--quick runs toy shapes on a CPU)")
        return 0
    if arguments.quick:
        arguments.length, arguments.steps, arguments.warmup, arguments.batches = 64, 2, 1, [1, 2]
        arguments.cur_rank, arguments.inner_rank = 8, 12
        print("toy shapes: these figures say nothing about 7B-8B models")
    rows = measure(arguments)
    print(
        format_table(
            [
                "backbone",
                "weights",
                "batch",
                "offload",
                "method",
                "tokens/s",
                "FLOP use",
                "peak GiB",
                "planned",
            ],
            [
                [
                    *(row[key] for key in ("backbone", "weights", "batch", "offload", "method")),
                    f"{row['tokens_per_second']:.0f}" if "error" not in row else "out of memory",
                    f"{row['flop_utilisation']:.1%}" if row.get("flop_utilisation") else "",
                    f"{row['peak_bytes'] / GIB:.2f}" if row.get("peak_bytes") else "",
                    f"{row['planned_bytes'] / GIB:.2f}" if row.get("peak_bytes") else "",
                ]
                for row in rows
            ],
        )
    )
    summary = goals(rows)
    for name, goal in summary.items():
        print(f"{name}: {goal['measured']} (goal: {goal['goal']})")
    if arguments.out:
        settings = {key: value for key, value in vars(arguments).items() if key != "out"}
        document = {
            "settings": settings,
            "environment": describe_environment(),
            "goals": summary,
            "rows": rows,
        }
        atomic_write_json(arguments.out, document)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))

"""Time of a training step: SECURA (merge, forward) against PEFT LoRA and DoRA, alternately in one process.

Same model, layers and batch; LoRA's rank is the one that comes nearest to SECURA's trainable parameters.
Prints medians and ratios to LoRA, and writes JSON. Goals: merge at most 1.10, forward at most 1.35.

    python benchmarks/step_time.py --out step_time.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from secura_ds import SecuraConfig
from secura_ds.embedded import embedded_checkpoint
from secura_ds.errors import run_command
from secura_ds.files import atomic_write_json
from secura_ds.report.table import format_table

REFERENCE = "lora"


def contenders(targets: list[str], cur_rank: int, inner_rank: int, lora_rank: int) -> dict[str, PeftConfig]:
    """The adapter configurations compared, by name."""

    def secura(apply: str) -> SecuraConfig:
        return SecuraConfig(
            cur_rank=cur_rank, inner_rank=inner_rank, target_modules=targets, smagnorm={"apply": apply}
        )

    def lora(use_dora: bool) -> LoraConfig:
        return LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=targets, use_dora=use_dora)

    return {
        REFERENCE: lora(False),
        "secura, merge": secura("merge"),
        "secura, forward": secura("forward"),
        "dora": lora(True),
    }


def equal_lora_rank(model: nn.Module, targets: list[str], cur_rank: int, inner_rank: int) -> int:
    """The LoRA rank whose trainable parameters come nearest to SECURA's on the same layers."""
    layers = [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in targets]
    per_rank = sum(layer.in_features + layer.out_features for layer in layers)
    return max(1, round(2 * cur_rank * inner_rank * len(layers) / per_rank))


class Contender:
    """One adapted model with its optimizer."""

    def __init__(self, config: PeftConfig, dtype: torch.dtype) -> None:
        base = AutoModelForCausalLM.from_pretrained(embedded_checkpoint(), dtype=dtype)
        self.model = get_peft_model(base, config).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.seconds: list[float] = []

    def step(self, ids: torch.Tensor) -> None:
        """One forward, backward and optimizer step on `ids` (batch, length), timed."""
        start = time.perf_counter()
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Run the contenders in turn, a step each, and return one row per contender."""
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    base = AutoModelForCausalLM.from_pretrained(embedded_checkpoint(), dtype=dtype)
    lora_rank = equal_lora_rank(base, arguments.targets, arguments.cur_rank, arguments.inner_rank)
    vocabulary = base.config.vocab_size
    del base
    configs = contenders(arguments.targets, arguments.cur_rank, arguments.inner_rank, lora_rank)
    running = {name: Contender(config, dtype) for name, config in configs.items()}
    for _ in range(arguments.warmup + arguments.steps):
        ids = torch.randint(3, vocabulary, (arguments.batch, arguments.length))
        for contender in running.values():
            contender.step(ids)
    reference = running[REFERENCE].seconds[arguments.warmup :]
    rows: list[dict[str, object]] = []
    for name, contender in running.items():
        seconds = contender.seconds[arguments.warmup :]
        pairs = [a / b for a, b in zip(seconds, reference, strict=True)]
        rows.append(
            {
                "method": name,
                "trainable_parameters": sum(p.numel() for p in contender.parameters),
                "median_seconds": statistics.median(seconds),
                "ratio_to_lora": statistics.median(pairs),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"])
    parser.add_argument("--cur-rank", type=int, default=64)
    parser.add_argument("--inner-rank", type=int, default=96)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    rows = measure(arguments)
    print(
        format_table(
            ["method", "trainable", "median s", "ratio to LoRA"],
            [
                [
                    r["method"],
                    f"{r['trainable_parameters']:,}",
                    f"{r['median_seconds']:.3f}",
                    f"{r['ratio_to_lora']:.2f}",
                ]
                for r in rows
            ],
        )
    )
    if arguments.out:
        settings = {k: v for k, v in vars(arguments).items() if k != "out"}
        atomic_write_json(arguments.out, {"settings": settings, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))

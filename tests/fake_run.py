"""A run folder as a real run of the embedded backbone leaves it, with made-up but plausible numbers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

MODULES = ("self_attn.q_proj", "self_attn.v_proj")


def make_run(
    folder: Path,
    *,
    method: str = "secura",
    name: str = "smollm2-135m",
    steps: int = 120,
    blocks: int = 30,
    modules: tuple[str, ...] = MODULES,
    seed: int = 0,
) -> Path:
    """Write a complete run folder and return it."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    secura = method == "secura"
    _write(folder / "recipe.resolved.json", _recipe(name, method))
    _write(folder / "environment.json", ENVIRONMENT)
    _write(folder / "data.json", DATA)
    _write(folder / "run.json", _run(steps, secura))
    _write(folder / "evaluation.before.json", evaluation(0.0125, 0.9167, 2.711, before=True))
    after = (0.9125, 0.9000, 2.724) if secura else (0.9375, 0.7333, 2.803)
    _write(folder / "evaluation.after.json", evaluation(*after, before=False))
    _write(folder / "merge.json", MERGE)
    _write_lines(folder / "metrics.jsonl", _metrics(rng, steps, 1.0 if secura else 0.9))
    if secura:
        _write_lines(folder / "statistics.jsonl", _statistics(rng, steps, blocks, modules))
    return folder


def evaluation(task: float, capitals: float, loss: float, *, before: bool) -> dict[str, Any]:
    """An evaluation document as `launch/evaluate.py` writes it."""
    return {
        "task": {
            "metric": "json_exact_match",
            "score": task,
            "stderr": math.sqrt(task * (1 - task) / 160),
            "n": 160,
            "examples": [_example(index, before=before, right=rightly(index, before)) for index in range(12)],
        },
        "probes": {
            "facts": {
                "kind": "multiple_choice",
                "score": capitals,
                "stderr": math.sqrt(capitals * (1 - capitals) / 120),
                "n": 120,
                "chance": 0.25,
                "topics": {
                    "capitals": {"score": capitals + 0.04, "n": 60},
                    "elements": {"score": capitals - 0.04, "n": 60},
                },
            },
            "general_text": {"kind": "text_loss", "mean_token_loss": loss, "stderr": 0.031, "n": 40},
        },
    }


def rightly(index: int, before: bool) -> bool:
    """Whether example `index` is answered correctly."""
    return not before and index != 3


def _example(index: int, *, before: bool, right: bool) -> dict[str, Any]:
    items = ("flat white", "oat latte", "croissant", "lemon cake", "espresso", "iced tea")
    number, item = index % 4 + 1, items[index % len(items)]
    expected = json.dumps({"item": item, "count": number, "to_go": index % 2 == 0, "name": f"Guest {index}"})
    wrong = (
        f"Sure! I can help you with that. You would like {number} {item}"
        if before
        else expected.replace("}", "")
    )
    return {
        "prompt": f"Turn the order into JSON.\n\nHi, it's Guest {index}; {number} {item}s please"
        + (", to go & <b>quick</b>!" if index % 2 == 0 else "."),
        "expected": expected,
        "answer": expected if right else wrong,
        "correct": right,
    }


def _metrics(rng: random.Random, steps: int, factor: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        progress = step / steps
        loss = factor * (0.12 + 2.4 * math.exp(-7 * progress)) + rng.gauss(
            0, 0.03 + 0.15 * math.exp(-6 * progress)
        )
        rate = 1e-3 * min(1.0, progress / 0.06) * 0.5 * (1 + math.cos(math.pi * progress))
        rows.append(
            {
                "step": step,
                "epoch": progress * 2,
                "loss": max(loss, 0.01),
                "learning_rate": rate,
                "grad_norm": 1.8 * math.exp(-3 * progress) + abs(rng.gauss(0, 0.12)),
                "tokens_per_second": rng.gauss(610, 18),
                "memory_bytes": int(2.31 * 2**30 + rng.random() * 2**24),
                "seconds": step * 2.1,
            }
        )
        if step % max(1, steps // 6) == 0:
            rows.append({"step": step, "eval_loss": factor * (0.16 + 2.3 * math.exp(-7 * progress))})
    return rows


def _statistics(
    rng: random.Random, steps: int, blocks: int, modules: tuple[str, ...]
) -> list[dict[str, Any]]:
    weights = {
        f"model.layers.{block}.{module}": 0.5 + rng.random() + (0.8 if 8 < block < 18 else 0)
        for block in range(blocks)
        for module in modules
    }
    rows = []
    for step in range(max(1, steps // 40), steps + 1, max(1, steps // 40)):
        growth = 1 - math.exp(-4 * step / steps)
        layers = {
            name: {
                "ratio_max": 10 ** (2 + 2 * growth * weight / 2 + rng.gauss(0, 0.1)),
                "limiter_mean": 1.953 - 0.04 * weight * growth,
                "relative_change": 0.09 * weight * growth,
            }
            for name, weight in weights.items()
        }
        rows.append({"step": step, "layers": layers})
    return rows


def _recipe(name: str, method: str) -> dict[str, Any]:
    targets = {"target_modules": None, "exclude_modules": None, "modules_to_save": None}
    secura = {
        "method": "secura",
        "cur_rank": 64,
        "inner_rank": 96,
        "scaling": 1.0,
        "selection": "calibrated",
        "init": "block",
        "calibration": {
            "mode": "null",
            "text": None,
            "num_tokens": 7680,
            "energy": 0.9,
            "floor": 0.03,
            "seed": 0,
        },
        "strategy": "M2",
        "fold_every": 0,
        "smagnorm": {"apply": "forward", "form": "update", "steepness": 6.0, "eps_relative": 1.0},
    }
    lora = {"method": "lora", "rank": 8, "alpha": 16, "dropout": 0.0}
    return {
        "name": name,
        "description": "Free-text café orders to strict JSON, on the embedded SmolLM2-135M-Instruct.",
        "backbone": {
            "model": "embedded:smollm2-135m",
            "dtype": "bfloat16",
            "attention": "auto",
            "quantization": None,
        },
        "adapter": {**(secura if method == "secura" else lora), **targets},
        "data": {"sources": [{"path": "tasks/orders-train.jsonl", "weight": 1.0}], "max_length": 512},
        "training": {
            "output_dir": "runs/x",
            "learning_rate": 1e-3 if method == "secura" else 5e-4,
            "max_steps": 120,
        },
    }


def _run(steps: int, secura: bool) -> dict[str, Any]:
    return {
        "status": "finished",
        "steps": steps,
        "seconds": 252.4,
        "peak_memory_bytes": int(2.34 * 2**30),
        "trainable_parameters": 737280 if secura else 737000,
        "tokens": 153_216,
    }


DATA = {
    "sources": [
        {
            "name": "orders.jsonl",
            "read": 1800,
            "dropped": 0,
            "cut": 3,
            "unused": ["id"],
            "sha256": "0" * 64,
            "used": 1800,
        }
    ],
    "train_examples": 1800,
    "train_rows": 450,
    "train_tokens": 149604,
    "learnt_tokens": 52672,
    "longest": 102,
    "validation_examples": 0,
}

ENVIRONMENT = {
    "python": "3.11.2",
    "platform": "Linux-6.1-x86_64",
    "packages": {"secura_ds": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "deepspeed": "0.19.8"},
    "git_commit": "79b1d05c0ffee",
    "devices": ["cpu"],
    "cpu_count": 2,
    "world_size": 2,
}

MERGE = {
    "base": "cache/smollm2-135m",
    "adapter": "runs/smollm2-135m/adapter",
    "out": "runs/smollm2-135m/merged",
    "onto": "trained",
    "trained_in_4_bits": False,
    "seconds": 7.4,
    "bytes": 269_060_552,
    "resumed_bytes": 0,
    "adapted_tensors": 60,
    "dequantized_tensors": 0,
    "untouched_tensors": 212,
    "workers": 1,
    "peak_memory_bytes": 310_000_000,
    "peak_memory_sum_bytes": 310_000_000,
    "max_logit_gap": 0.00021,
    "kl": 3.1e-9,
    "check_skipped": None,
}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

"""A results folder as a task sequence leaves it, with made-up but plausible numbers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fake_run import _metrics, _write, _write_lines

METHODS = ("secura", "lora", "osf", "dora")
STRATEGIES = ("seq", "er", "ewc", "i-lora")
TASKS = ("orders", "german", "units", "dates", "names", "sums", "rhymes", "codes", "routes", "prices",
         "labels", "shifts", "lists", "maps", "notes", "forms")  # fmt: skip
LEARNT = {"secura": 0.82, "lora": 0.88, "osf": 0.78, "dora": 0.87}
LOST = {"secura": 0.02, "lora": 0.09, "osf": 0.04, "dora": 0.08}
"""Score of a task right after its training, and share of it lost with every later task."""


def make_continual(
    folder: Path,
    *,
    tasks: int = 3,
    entries: int = 3,
    seeds: int = 2,
    orders: int = 1,
    name: str = "three-tasks",
    unfinished: int = 0,
    runs: bool = True,
) -> Path:
    """Write the results of `entries` settings, each trained `seeds` times in `orders` orders of `tasks`.

    Args:
        unfinished: that many of the last sequences stopped before their last task.
        runs: whether the stages' run folders are there.
    """
    chosen = [
        (METHODS[index % len(METHODS)], STRATEGIES[index // len(METHODS) % len(STRATEGIES)], 3e-4)
        for index in range(entries)
    ]
    names = list(TASKS[:tasks])
    shuffles = [names[turn:] + names[:turn] for turn in range(orders)]
    plan = [(setting, order, seed) for setting in chosen for order in shuffles for seed in range(seeds)]
    return _write_results(folder, name, names, plan, unfinished, runs)


def make_frontier(
    folder: Path, *, methods: int = 3, rates: Sequence[float] = (1e-4, 3e-4, 1e-3), name: str = "frontier",
    seeds: int = 1, tasks: int = 1,
) -> Path:  # fmt: skip
    """Write the results of a sweep of learning rates on single tasks: every rate is an entry of its own."""
    plan = [
        ((method, "seq", rate), [task], seed)
        for method in METHODS[:methods]
        for rate in rates
        for task in TASKS[:tasks]
        for seed in range(seeds)
    ]
    return _write_results(folder, name, list(TASKS[:tasks]), plan, 0, True)


def _write_results(
    folder: Path, name: str, tasks: list[str], plan: list[Any], unfinished: int, runs: bool
) -> Path:
    folder.mkdir(parents=True)
    rates = len({setting[2] for setting, _, _ in plan}) > 1
    sequences = []
    for number, (setting, order, seed) in enumerate(plan):
        stop = number >= len(plan) - unfinished
        sequence = _sequence(number, setting, order, seed, rates=rates, stages=len(order) - stop)
        sequences.append(sequence)
        for place, stage in enumerate(sequence["stages"], start=1):
            if runs:
                _make_stage(folder / sequence["folder"] / "stages" / f"{place:02d}-{stage['task']}", number)
    document = {
        "format": 1,
        "name": name,
        "description": "Small tasks one after the other, on the embedded backbone.",
        "status": "unfinished" if unfinished else "finished",
        "backbone": "embedded:smollm2-135m",
        "tasks": [_task(task) for task in tasks],
        "probes": [
            {"name": "knowledge", "kind": "multiple_choice", "chance": 0.25, "items": 288},
            {"name": "general_text", "kind": "text_loss", "chance": None, "items": 198},
        ],
        "before": _measured(tasks, {}, 0.0, 1.0),
        "sequences": sequences,
    }
    (folder / "continual.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def _task(name: str) -> dict[str, Any]:
    bleu = name == "german"
    return {
        "name": name,
        "metric": "bleu" if bleu else "exact_match",
        "maximum": 100.0 if bleu else 1.0,
        "chance": 0.0,
        "items": 100,
    }


def _sequence(
    number: int, setting: tuple[str, str, float], order: list[str], seed: int, *, rates: bool, stages: int
) -> dict[str, Any]:
    method, strategy, rate = setting
    entry = method if strategy == "seq" else f"{method}-{strategy}"
    entry += f"-{rate:g}" if rates else ""
    label = f"{entry}-{'-'.join(task[:2] for task in order[:2])}-seed{seed}"
    rng = random.Random(number)
    speed = math.log10(rate / 3e-4) * 0.2
    learnt = {"er": 0.97, "ewc": 0.9, "i-lora": 0.95}.get(strategy, 1.0) * (LEARNT[method] + speed)
    lost = LOST[method] * (0.4 if strategy != "seq" else 1.0) * (1 + 2 * max(speed, -0.4))
    return {
        "label": label,
        "entry": entry,
        "method": method,
        "strategy": strategy,
        "order": order,
        "seed": seed,
        "learning_rate": rate,
        "settings": {"method": method, "rank": 8}
        if method != "secura"
        else {"method": method, "cur_rank": 64},
        "folder": f"sequences/{label}",
        "status": "finished" if stages == len(order) else "unfinished",
        "trainable_parameters": 737_280 if method == "secura" else 737_000,
        "buffer_examples": 200 if strategy == "er" else 0,
        "buffer_bytes": 61_440 if strategy == "er" else 0,
        "stages": _stages(rng, order[:stages], order, learnt, lost),
        "metrics": None,
    }


def _stages(
    rng: random.Random, done: list[str], order: list[str], learnt: float, lost: float
) -> list[dict[str, Any]]:
    stages = []
    scores: dict[str, float] = {}
    for place, task in enumerate(done, start=1):
        scores = {name: score * (1 - lost * rng.uniform(0.5, 1.5)) for name, score in scores.items()}
        scores[task] = min(0.98, learnt + rng.gauss(0, 0.01))
        measured = _measured(order, scores, place * lost, 1 + rng.gauss(0, 0.002))
        train = {
            "steps": 20,
            "seconds": 31.5 + place,
            "tokens": 61_440,
            "peak_memory_bytes": int(1.2 * 2**30),
            "loss": 0.35 + rng.uniform(0, 0.1),
        }
        stages.append({"task": task, **measured, "train": train})
    return stages


def _measured(tasks: Sequence[str], scores: dict[str, float], harm: float, noise: float) -> dict[str, Any]:
    result: dict[str, Any] = {"tasks": {}, "probes": {}}
    for index, name in enumerate(tasks):
        score = scores.get(name, 0.02 * (index % 3))
        scale = _task(name)["maximum"]
        result["tasks"][name] = {
            "score": scale * score,
            "stderr": scale * math.sqrt(score * (1 - score) / 100),
            "loss": 2.6 - 2 * score,
            "loss_stderr": 0.04,
        }
    knowledge = 0.25 + 0.66 * math.exp(-2 * harm) * noise
    error = math.sqrt(knowledge * (1 - knowledge) / 288)
    result["probes"]["knowledge"] = {"score": knowledge, "stderr": error}
    result["probes"]["general_text"] = {"score": 3.16 + 2 * harm * noise, "stderr": 0.03}
    return result


def _make_stage(folder: Path, seed: int) -> None:
    """As much of a run folder as a page of sequences reads."""
    folder.mkdir(parents=True)
    _write(folder / "run.json", {"status": "finished", "steps": 20})
    _write_lines(folder / "metrics.jsonl", _metrics(random.Random(seed), 20, 1.0))

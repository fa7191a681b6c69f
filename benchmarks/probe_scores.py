"""Scores of SmolLM2-135M-Instruct on the wide probes before any training, and on the topics left out.

python benchmarks/probe_scores.py --out benchmarks/results/probe_scores.json
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from make_probes import LEFT_OUT, PROBES, candidates, mixed
from transformers import AutoModelForCausalLM, AutoTokenizer

from secura_ds.embedded import embedded_checkpoint
from secura_ds.errors import run_command
from secura_ds.evaluation import evaluate
from secura_ds.files import atomic_write_json, atomic_write_text
from secura_ds.recipe import EvaluationRecipe, Probe
from secura_ds.report import format_table

KNOWLEDGE, TEXT = PROBES / "knowledge-wide.jsonl", PROBES / "general-wide.txt"


def measure(left_out: Path) -> dict[str, Any]:
    """The probes' scores by name; topics left out are a probe of their own, written to `left_out`."""
    questions = [KNOWLEDGE]
    if LEFT_OUT:
        atomic_write_text(left_out, mixed(item for item in candidates() if item["topic"] in LEFT_OUT))
        questions.append(left_out)
    probes = [Probe(kind="multiple_choice", path=str(path)) for path in questions]
    probes.append(Probe(kind="text_loss", path=str(TEXT)))
    folder = embedded_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = evaluate(model, tokenizer, EvaluationRecipe(probes=probes, batch_size=16))["probes"]
    return {
        name: {key: value for key, value in score.items() if key != "items"} for name, score in scores.items()
    }


def rows(scores: dict[str, Any]) -> list[list[str]]:
    """Lines of the table: whole probes, then topics from the best to the worst."""
    lines = []
    for name, score in scores.items():
        if score["kind"] == "text_loss":
            lines.append(
                [name, str(score["n"]), f"{score['mean_token_loss']:.3f} ± {score['stderr']:.3f} nats"]
            )
        else:
            lines.append([name, str(score["n"]), f"{score['score']:.1%} ± {score['stderr']:.1%}"])
    topics = [
        (topic["score"], topic["n"], f"{name}: {key}")
        for name, score in scores.items()
        for key, topic in score.get("topics", {}).items()
    ]
    return lines + [[name, str(n), f"{value:.0%}"] for value, n, name in sorted(topics, reverse=True)]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        scores = measure(Path(temporary) / "left-out.jsonl")
    print(format_table(["probe or topic", "n", "score"], rows(scores)))
    if arguments.out:
        atomic_write_json(arguments.out, {"model": "SmolLM2-135M-Instruct, bfloat16", "probes": scores})
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))

"""What a sequence did to answers of general knowledge, in more than right and wrong.

For the untouched model of a results folder and the last adapter of each named sequence: the share of
questions answered right by the likeliest choice and by the likeliest per token; the log-probability of the
right choice among the choices; and the log-likelihood per token of the right answer itself, which also rises
where a model has become readier to answer at all. Changes have standard errors over paired questions.

    python benchmarks/answer_likelihoods.py runs/smollm2-long-small LABEL...
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_ds.adapter import load_adapter
from secura_ds.backbones import load_model, load_tokenizer
from secura_ds.errors import UserError, run_command
from secura_ds.evaluation.batching import batches
from secura_ds.evaluation.choice import Question, likelihoods, read_questions, tokens_of
from secura_ds.files import atomic_write_json
from secura_ds.reading import read_json_object
from secura_ds.recipe.schema import BackboneRecipe
from secura_ds.report import format_table

PROBE = Path(__file__).resolve().parents[1] / "recipes" / "probes" / "knowledge-wide.jsonl"
MEASURES = ("right", "right per token", "log p among choices", "log-likelihood per token")
UNTOUCHED = "untouched"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="a results folder of launch/continual.py, with adapters")
    parser.add_argument("sequences", nargs="+", help="labels of its sequences")
    parser.add_argument("--probe", type=Path, default=PROBE, help="multiple-choice questions")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(argv)
    adapters = {label: _last_adapter(options.results, label) for label in options.sequences}
    recipe = read_json_object(options.results / "recipe.resolved.json")
    backbone = BackboneRecipe.model_validate(recipe["backbone"])
    tokenizer, questions = load_tokenizer(backbone), read_questions(options.probe)
    found: dict[str, np.ndarray] = {}
    for name, adapter in {UNTOUCHED: None, **adapters}.items():
        model: Any = load_model(backbone).requires_grad_(False)
        if adapter is not None:
            model = load_adapter(model, adapter)
        found[name] = measure(model.eval(), tokenizer, questions)
    figures = {name: _figures(values, found[UNTOUCHED]) for name, values in found.items()}
    rows = [[name, *(_written(figure) for figure in row.values())] for name, row in figures.items()]
    print(format_table(["model", *MEASURES], rows))
    if options.out is not None:
        atomic_write_json(options.out, {"questions": len(questions), "models": figures})
    return 0


def _last_adapter(results: Path, label: str) -> Path:
    stages = sorted((results / "sequences" / label / "stages").glob("*/adapter"))
    if not stages:
        raise UserError(
            f"{results / 'sequences' / label} has no adapter: name a sequence that was trained here"
        )
    return stages[-1]


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> np.ndarray:
    """`MEASURES` of each question: (questions, 4)."""
    prompts, choices = tokens_of(tokenizer, questions)
    result = np.zeros((len(questions), len(MEASURES)))
    with torch.no_grad():
        for batch in batches(prompts, 16, len, "questions", progress=True):
            scores = likelihoods(model, tokenizer, [prompts[i] for i in batch], [choices[i] for i in batch])
            for i, score in zip(batch, scores, strict=True):
                per_token = score / [len(choice) for choice in choices[i]]
                answer = questions[i].answer
                among = score[answer] - np.logaddexp.reduce(score)
                right = score.argmax() == answer, per_token.argmax() == answer
                result[i] = (*right, among, per_token[answer])
    return result


def _figures(values: np.ndarray, before: np.ndarray) -> dict[str, dict[str, float]]:
    changes = values - before
    return {
        name: {
            "mean": float(values[:, i].mean()),
            "change": float(changes[:, i].mean()),
            "stderr": float(changes[:, i].std() / len(changes) ** 0.5),
        }
        for i, name in enumerate(MEASURES)
    }


def _written(figure: dict[str, float]) -> str:
    change = f" ({figure['change']:+.3f} ± {figure['stderr']:.3f})" if figure["stderr"] else ""
    return f"{figure['mean']:.3f}{change}"


if __name__ == "__main__":
    raise SystemExit(run_command(main))

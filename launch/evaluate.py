"""Score a model on a recipe's task and probes: the backbone itself, a merged checkpoint or an adapter.

Interrupted by Ctrl-C, SIGTERM or SIGUSR1, the same command with the same --out goes on after what was
finished.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_ds.adapter import load_adapter
from secura_ds.backbones import load_model, load_tokenizer
from secura_ds.errors import UserError, run_command
from secura_ds.evaluation import Parts, evaluate, fingerprints
from secura_ds.files import atomic_write_json, check_writable
from secura_ds.recipe import Recipe, load_recipe
from secura_ds.report import evaluation_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, evaluate, print the table and write the document."""
    options = _parser().parse_args(arguments)
    recipe = load_recipe(options.recipe, options.set)
    if recipe.evaluation.task is None and not recipe.evaluation.probes:
        raise UserError(
            f"{options.recipe} has nothing to evaluate: give evaluation.task or evaluation.probes"
        )
    if options.out is not None:
        check_writable(options.out)
    model, tokenizer = _load(recipe, options.model, options.adapter)
    subject = options.model or options.adapter or recipe.backbone.model
    parts = _parts(recipe, Path(subject), options.out) if options.out is not None else None
    document = evaluate(
        model, tokenizer, recipe.evaluation, recipe.resolve_path, progress=not options.quiet, parts=parts
    )
    print(evaluation_table({"value": document}))
    if options.out is not None and parts is not None:
        atomic_write_json(options.out, {"model": str(subject), "recipe": recipe.name, **document})
        parts.forget()
        print(f"written: {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="recipe whose `evaluation` says what is measured")
    subject = parser.add_mutually_exclusive_group()
    subject.add_argument(
        "--model", type=Path, metavar="DIR", help="whole checkpoint (default: the recipe's backbone)"
    )
    subject.add_argument(
        "--adapter", type=Path, metavar="DIR", help="adapter to put on the recipe's backbone"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe value"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the whole document as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def _parts(recipe: Recipe, subject: Path, out: Path) -> Parts:
    """What an interrupted evaluation of the same model, with the same files, had finished."""
    evaluation = recipe.evaluation
    paths = [source.path for source in (evaluation.task, *evaluation.probes) if source is not None]
    inputs = {
        "backbone": recipe.backbone.model_dump(),
        "evaluation": evaluation.model_dump(),
        "files": fingerprints([subject, *map(recipe.resolve_path, paths)]),
    }
    return Parts(out.with_name(f".{out.name}.partial"), inputs)


def _load(
    recipe: Recipe, checkpoint: Path | None, adapter: Path | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    backbone = recipe.backbone
    if checkpoint is not None:
        if not (checkpoint / "config.json").is_file():
            raise UserError(f"--model {checkpoint} holds no config.json, so it is no Hugging Face checkpoint")
        # A merged checkpoint is whole, whatever the recipe trained against.
        changes = {"model": str(checkpoint), "revision": None, "quantization": None}
        backbone = backbone.model_copy(update=changes)
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise UserError(f"--adapter {adapter} holds no adapter_config.json, so it is no adapter")
    model, tokenizer = load_model(backbone), load_tokenizer(backbone)
    if torch.cuda.is_available() and backbone.quantization is None:
        model.to("cuda")
    if adapter is not None:
        model = load_adapter(model, adapter)
    return model, tokenizer


if __name__ == "__main__":
    sys.exit(run_command(main))

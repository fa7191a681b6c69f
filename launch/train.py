"""Train an adapter as a recipe says.

    deepspeed launch/train.py recipes/smollm2-135m.json      n processes, weights in n parts
    python launch/train.py recipes/qlora/llama3.1-8b.json    one process, one GPU or the CPU

A run interrupted by Ctrl-C, SIGTERM or SIGUSR1 saves a checkpoint; the same command with --resume goes on.
After one of the last two, which a cluster sends, the exit status is 75.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import secura_ds  # noqa: F401 - registers our adapter with PEFT
from secura_ds.backbones import load_tokenizer
from secura_ds.console import set_up_console
from secura_ds.data import build_datasets, show_examples
from secura_ds.environment import is_main_process
from secura_ds.errors import run_command
from secura_ds.ranks import end_process
from secura_ds.recipe import Recipe, load_recipe
from secura_ds.stopping import exit_status
from secura_ds.training import RunSummary, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, train, and say where the result is."""
    options = _parser().parse_args(arguments)
    set_up_console()
    recipe = load_recipe(options.recipe, options.set)
    if options.show_examples is not None:
        return _show(recipe, options.show_examples)
    summary = train(recipe, resume=options.resume, overwrite=options.overwrite)
    if is_main_process():
        print(_account(recipe, summary))
    return 0 if summary.signal is None else exit_status(summary.signal)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="the recipe, a JSON file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="override a value of the recipe; repeatable",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="delete the run in the output folder")
    parser.add_argument(
        "--show-examples",
        type=_count,
        metavar="N",
        help="only print N examples as tokens with the loss mask",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return int(text)


def _show(recipe: Recipe, count: int) -> int:
    tokenizer = load_tokenizer(recipe.backbone)
    rows, _, report = build_datasets(recipe, tokenizer)
    if is_main_process():
        print(show_examples(rows, tokenizer, count))
        print(report.summary())
    return 0


def _account(recipe: Recipe, summary: RunSummary) -> str:
    folder = recipe.training.output_dir
    what = f"{summary.steps} steps, {summary.tokens:,} tokens in {summary.seconds:.0f} s"
    if summary.status == "finished":
        if recipe.adapter.method == "full":
            return f"finished: {what}; the model is {summary.merged}"
        merged = f", the merged checkpoint {folder}/merged" if summary.merged else ""
        return f"finished: {what}; the adapter is {folder}/adapter{merged}"
    return f"interrupted after {what}; --resume goes on from {folder}/checkpoints"


if __name__ == "__main__":
    end_process(run_command(main))

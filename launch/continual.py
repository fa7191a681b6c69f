"""Train and measure task sequences as a recipe says: one or several methods, the same tasks.

    deepspeed launch/continual.py recipes/continual/NAME.json    n processes, weights in n parts
    python launch/continual.py recipes/continual/NAME.json       one process, one GPU or the CPU
    python launch/continual.py ... --resume --share 2/4          the second of four such processes

After each task every task and every retention probe is scored. The same command with --resume goes on after
what is finished, also after a kill; a recipe may have gained methods, learning rates, orders or seeds since.
After SIGTERM or SIGUSR1, which a cluster sends, the exit status is 75.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import secura_ds  # noqa: F401 - registers our adapter with PEFT
from secura_ds.console import set_up_console
from secura_ds.continual import Share, run_sequences
from secura_ds.environment import is_main_process
from secura_ds.errors import run_command
from secura_ds.ranks import end_process
from secura_ds.recipe import load_sequence_recipe
from secura_ds.report import write_report
from secura_ds.stopping import exit_status


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run the sequences, and write the report."""
    options = _parser().parse_args(arguments)
    set_up_console()
    recipe = load_sequence_recipe(options.recipe, options.set)
    summary = run_sequences(recipe, resume=options.resume, overwrite=options.overwrite, share=options.share)
    if is_main_process():
        diverged = f", {summary.diverged} diverged" if summary.diverged else ""
        print(f"{summary.finished} of {summary.planned} sequences finished{diverged}")
        if summary.signal is None:
            print(f"written: {write_report([Path(recipe.output_dir)])}")
        else:
            print("interrupted: --resume goes on from here")
    return 0 if summary.signal is None else exit_status(summary.signal)


def _share(text: str) -> Share:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part such as 1/4")
    return Share(int(number), int(of))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/continual.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="the recipe of task sequences, a JSON file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="override a value of the recipe; repeatable",
    )
    parser.add_argument("--resume", action="store_true", help="go on after what is finished")
    parser.add_argument("--overwrite", action="store_true", help="delete what the output folder holds")
    parser.add_argument(
        "--share",
        type=_share,
        metavar="I/N",
        help="take the I-th of N equal parts of the sequences: N processes, each with a GPU of its own, fill "
        "one results folder (with --resume, which the first of them does not need)",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser


if __name__ == "__main__":
    end_process(run_command(main))

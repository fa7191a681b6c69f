"""What training did to weights and gradients, one question a command: a table, and with --out a JSON file.

    python launch/analyze.py spectra RUN_DIR
    python launch/analyze.py gradients RUN_DIR RUN_DIR

spectra, changes and limiter read an adapter and its backbone one layer at a time; gradients reads logs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import secura_ds  # noqa: F401 - registers our adapter with PEFT
from secura_ds.analysis import LEVELS, limiter_statistics, norm_statistics, spectra, weight_changes
from secura_ds.analysis.weights import adapted_weights
from secura_ds.backbones import resolve_base
from secura_ds.checkpoint_files import Checkpoint, open_checkpoint
from secura_ds.errors import UserError, run_command
from secura_ds.files import atomic_write_json, check_writable
from secura_ds.merge.adapter_file import CONFIG_NAME, AdapterFile, open_adapter
from secura_ds.reading import read_json_object
from secura_ds.report import format_table, numbers
from secura_ds.report.norms import logged_norms

MEAN = "mean over layers"


class Columns(NamedTuple):
    """A table's numbers: names, and a row of values per layer."""

    names: tuple[str, ...]
    rows: Mapping[str, tuple[float, ...]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, analyse, print the table and write the document."""
    options = _parser().parse_args(arguments)
    if options.out is not None:
        check_writable(options.out)
    columns = options.analyse(options)
    document: dict[str, Any] = {
        "analysis": options.analysis,
        "rows": {name: dict(zip(columns.names, row, strict=True)) for name, row in columns.rows.items()},
    }
    shown = dict(columns.rows)
    if options.analysis != "gradients":
        means = tuple(fmean(row[i] for row in columns.rows.values()) for i in range(len(columns.names)))
        document["mean_over_layers"] = dict(zip(columns.names, means, strict=True))
        shown[MEAN] = means
    print(_table(columns.names, shown, "run" if options.analysis == "gradients" else "layer"))
    if options.out is not None:
        atomic_write_json(options.out, document)
        print(f"written: {options.out}")
    return 0


def _table(names: Sequence[str], rows: Mapping[str, Sequence[float]], first: str) -> str:
    heads = [name.replace("_", " ") for name in names]
    cells = [[name, *(numbers.compact(value) for value in row)] for name, row in rows.items()]
    return format_table([first, *heads], cells)


def _spectra(options: argparse.Namespace) -> Columns:
    names = ("norm_before", "norm_after", "norm_change", "mean_before", "mean_after", "mean_change")
    rows = {}
    for module, (before, after) in spectra(adapted_weights(*_adapter_and_base(options))):
        norm, mean = after.norm - before.norm, after.mean - before.mean
        rows[module] = (before.norm, after.norm, norm, before.mean, after.mean, mean)
    return Columns(names, rows)


def _changes(options: argparse.Namespace) -> Columns:
    found = weight_changes(adapted_weights(*_adapter_and_base(options)))
    return Columns(("relative_change", "root_mean_square", "largest"), {n: tuple(c) for n, c in found})


def _limiter(options: argparse.Namespace) -> Columns:
    names = ("mean", "smallest", *(f"quantile_{level:g}" for level in LEVELS), "largest", "ratio_max")
    rows = {
        module: (found.mean, found.smallest, *found.quantiles, found.largest, found.ratio_max)
        for module, found in limiter_statistics(*_adapter_and_base(options))
    }
    return Columns(names, rows)


def _gradients(options: argparse.Namespace) -> Columns:
    names = ("mean", "variance", "smallest", "largest", "range", "steps")
    rows = {}
    for label, norms in logged_norms(options.run_dir).items():
        found = norm_statistics(norms)
        rows[label] = (
            found.mean, found.variance, found.smallest, found.largest, found.range, found.steps
        )  # fmt: skip
    return Columns(names, rows)


def _adapter_and_base(options: argparse.Namespace) -> tuple[Checkpoint, AdapterFile]:
    """The base's files and the adapter's; the base by --base, else as the run or the adapter names it."""
    run: Path = options.run_dir
    adapter = open_adapter(run / "adapter" if (run / "adapter" / CONFIG_NAME).is_file() else run)
    base = options.base
    recipe = run / "recipe.resolved.json"
    if base is None and recipe.is_file():
        base = (read_json_object(recipe).get("backbone") or {}).get("model")
    base = base or adapter.config.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise UserError(f"{run} does not say which base its adapter belongs to: give it with --base")
    return open_checkpoint(resolve_base(base, options.revision)), adapter


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/analyze.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="analysis", required=True, metavar="ANALYSIS")
    for name, text, analyse in (
        ("spectra", "singular values of the adapted weights, before and after", _spectra),
        ("changes", "how far each adapted weight has moved", _changes),
        ("limiter", "how S-MagNorm's limiter M is distributed in each layer", _limiter),
    ):
        command = _command(commands, name, text, analyse)
        command.add_argument("run_dir", type=Path, metavar="DIR", help="a run's output_dir, or an adapter")
        command.add_argument("--base", help="checkpoint folder, hub id or embedded:smollm2-135m")
        command.add_argument("--revision", help="branch, tag or commit, if the base is a hub id")
    command = _command(commands, "gradients", "mean, range and variance of gradient norms", _gradients)
    command.add_argument(
        "run_dir",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="the output_dir of launch/train.py, or of launch/continual.py",
    )
    return parser


def _command(
    commands: Any, name: str, text: str, analyse: Callable[[argparse.Namespace], Columns]
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(analyse=analyse)
    command.add_argument("--out", type=Path, metavar="FILE", help="write every number as JSON")
    return command


if __name__ == "__main__":
    sys.exit(run_command(main))

"""The report page: one HTML file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secura_ds.errors import UserError
from secura_ds.files import atomic_write_text
from secura_ds.report import numbers, verdict
from secura_ds.report.bars import score_bars
from secura_ds.report.curves import training_curves
from secura_ds.report.data import data_tables
from secura_ds.report.examples import side_by_side
from secura_ds.report.layers import layer_plots
from secura_ds.report.missing import missing_notes
from secura_ds.report.run_folder import RunFolder, read_runs
from secura_ds.report.scores import part_scores, probe_scores
from secura_ds.report.sequence.folder import is_results_folder
from secura_ds.report.sequence.page import read_results_folders, render_sequences
from secura_ds.report.template import fill


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write one self-contained page about a run, or about several side by side, and its plots as PNGs.

    Args:
        folders: Run folders, or results folders of task sequences (they hold `continual.json`).
        out: The page's path; by default `report.html` in the folder, or `comparison.html` in the
            current folder for several. PNGs go into the folder's `plots/`, or for several into
            `<page>-plots/` beside the page.

    Returns:
        The path of the page.

    Raises:
        UserError: a folder is neither, both kinds are mixed, `out` is a folder, or the disk is full.
    """
    sequences = [folder for folder in folders if is_results_folder(folder)]
    if sequences and len(sequences) < len(folders):
        other = next(folder for folder in folders if folder not in sequences)
        raise UserError(
            f"{sequences[0]} holds the results of task sequences and {other} does not: "
            "give run folders alone, or results folders alone"
        )
    results, runs = (read_results_folders(folders), []) if sequences else ([], read_runs(folders))
    single = len(folders) == 1
    default = Path(folders[0]) / "report.html" if single else Path("comparison.html")
    page = default if out is None else Path(out)
    if page.is_dir():
        raise UserError(f"{page} is a folder: give --out the path of an HTML file")
    plots = Path(folders[0]) / "plots" if single else page.parent / f"{page.stem}-plots"
    html = render_sequences(results, plots) if sequences else render_page(runs, plots)
    atomic_write_text(page, html)
    return page


def render_page(runs: Sequence[RunFolder], plots: Path | None = None) -> str:
    """The page's HTML; PNGs of its plots go to `plots` unless that is None."""
    return fill("report.html", _content(runs, plots))


def _content(runs: Sequence[RunFolder], plots: Path | None) -> dict[str, Any]:
    single = len(runs) == 1
    headers, rows = verdict.score_table(runs)
    examples, num_examples = side_by_side(runs)
    return {
        "single": single,
        "title": _title([run.label for run in runs]),
        "description": (runs[0].recipe or {}).get("description") if single else None,
        "facts": verdict.fact_rows(runs),
        "runs": [_run_content(run) for run in runs],
        "score_headers": headers,
        "score_rows": rows,
        "score_plots": score_bars(runs, plots),
        "curves": training_curves(runs, plots),
        "data": data_tables(runs),
        "layers": layer_plots(runs, plots),
        "topics": _topics(runs),
        "examples": examples,
        "num_examples": num_examples,
        "missing": missing_notes(runs),
        "differences": [] if single else recipe_differences(runs),
        "environment": _environment_rows(runs),
        "torn": [f"{run.label}: {name}, {n}" for run in runs for name, n in run.skipped_lines.items()],
    }


def _title(labels: Sequence[str]) -> str:
    if len(labels) == 2:
        return " against ".join(labels)
    return " and ".join(part for part in (", ".join(labels[:-1]), labels[-1]) if part)


def _run_content(run: RunFolder) -> dict[str, Any]:
    facts = run.run or {}
    return {
        "label": run.label,
        "path": str(run.path),
        "status": str(facts.get("status", "unknown")),
        "findings": verdict.findings(run),
        "cards": verdict.cards(run),
        "merge": _document_rows(run.merge),
        "merge_line": verdict.merge_line(run.merge),
        "recipe": None if run.recipe is None else json.dumps(run.recipe, indent=2, ensure_ascii=False),
    }


def _topics(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Per probe with topics: a table of topics against runs, each `before → after`."""
    tables = []
    names = dict.fromkeys(
        name for run in runs for side in (run.before, run.after) for name in probe_scores(side)
    )
    for name in names:
        columns = [(part_scores(run.before, name), part_scores(run.after, name)) for run in runs]
        topics = list(dict.fromkeys(topic for pair in columns for side in pair for topic in side))
        rows = []
        for topic in topics:
            cells = []
            for before, after in columns:
                sides = [
                    side[topic].value_text() if topic in side else numbers.MISSING for side in (before, after)
                ]
                cells += sides if len(runs) == 1 else [" → ".join(sides)]
            n = next(side[topic].n for pair in columns for side in pair if topic in side)
            rows.append([topic, *cells, numbers.MISSING if n is None else numbers.count(n)])
        if rows:
            heads = ["Before", "After"] if len(runs) == 1 else [run.label for run in runs]
            tables.append(
                {
                    "name": name[:1].upper() + name[1:].replace("_", " "),
                    "headers": ["Topic", *heads, "Items"],
                    "rows": rows,
                }
            )
    return tables


def recipe_differences(runs: Sequence[RunFolder]) -> list[list[str]]:
    """Rows of a recipe key and each run's value, for every key in which the resolved recipes differ."""
    flat = [dict(_flatten(run.recipe or {})) for run in runs]
    keys = dict.fromkeys(key for recipe in flat for key in recipe)
    return [
        [
            key,
            *(
                json.dumps(recipe[key], ensure_ascii=False) if key in recipe else numbers.MISSING
                for recipe in flat
            ),
        ]
        for key in keys
        if any(recipe.get(key) != flat[0].get(key) for recipe in flat) and key not in ("name", "description")
    ]


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, inner in value.items():
        path = f"{prefix}{key}"
        if isinstance(inner, Mapping) and inner:
            rows += _flatten(inner, f"{path}.")
        else:
            rows.append((path, inner))
    return rows


def _document_rows(document: Mapping[str, Any] | None) -> list[list[str]]:
    return [
        ["size" if key == "bytes" else key.removesuffix("_bytes").replace("_", " "), _plain(value, key)]
        for key, value in _flatten(document or {})
        if value is not None
    ]


def _plain(value: Any, key: str = "") -> str:
    if isinstance(value, int | float) and key.endswith("bytes"):
        return numbers.memory(value)
    if isinstance(value, int | float) and key == "seconds":
        return numbers.duration(value)
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, float):
        return numbers.compact(value)
    if value is None:
        return numbers.MISSING
    return str(value)


def _environment_rows(runs: Sequence[RunFolder]) -> list[list[str]]:
    flat = [dict(_flatten(run.environment or {})) for run in runs]
    keys = dict.fromkeys(key for document in flat for key in document)
    return [
        [key.removeprefix("packages.").replace("_", " "), *(_plain(document.get(key)) for document in flat)]
        for key in keys
    ]

"""The page of one results folder of task sequences, or of several compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secura_ds.errors import UserError
from secura_ds.report import numbers
from secura_ds.report.sequence import tables
from secura_ds.report.sequence.curves import sequence_curves
from secura_ds.report.sequence.entries import Entry, Part, entries, parts
from secura_ds.report.sequence.folder import ResultsFolder, read_results
from secura_ds.report.sequence.frontier import frontier_plots
from secura_ds.report.sequence.gradients import Gradients, gradient_plots, gradient_table, read_gradients
from secura_ds.report.sequence.heatmaps import heat_maps
from secura_ds.report.sequence.verdict import findings
from secura_ds.report.template import fill


def read_results_folders(folders: Sequence[Path]) -> list[ResultsFolder]:
    """Read one results folder, or several that may be compared.

    Raises:
        UserError: one cannot be read, is given twice, or has other tasks or probes than the first.
    """
    real = [Path(folder).resolve() for folder in folders]
    for folder, resolved in zip(folders, real, strict=True):
        if real.count(resolved) > 1:
            raise UserError(f"{folder} is given twice: name each results folder once")
    homes = [read_results(folder) for folder in folders]
    for home in homes[1:]:
        for what in ("tasks", "probes"):
            first, other = ({part.name: part for part in getattr(h.results, what)} for h in (homes[0], home))
            if first != other:
                apart = sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
                raise UserError(
                    f"{homes[0].path} and {home.path} differ in their {what} ({', '.join(apart)}): "
                    "their scores do not compare; report each alone"
                )
    return homes


def render_sequences(homes: Sequence[ResultsFolder], plots: Path | None = None) -> str:
    """The page's HTML; PNGs of its plots go to `plots` unless that is None.

    Raises:
        UserError: the folders hold no sequence at all.
    """
    found = entries(homes)
    if not found:
        raise UserError(f"{homes[0].path}: there are no sequences yet; run launch/continual.py first")
    return fill("sequence.html", _content(homes, found, plots))


def _content(homes: Sequence[ResultsFolder], found: list[Entry], plots: Path | None) -> dict[str, Any]:
    names = [home.results.name for home in homes]
    split = parts(found)
    shown: list[dict[str, Any]] = []
    no_gradients: list[str] = []
    for number, part in enumerate(split, start=1):
        folder = plots if plots is None or len(split) == 1 else plots / f"tasks-{number}"
        gradients, absent = read_gradients(part.entries)
        shown.append(_part(part, gradients, folder))
        no_gradients += absent
    return {
        "title": " against ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}",
        "description": homes[0].results.description if len(homes) == 1 else None,
        "keys": _keys(homes, found),
        "homes": homes,
        "parts": shown,
        "missing": [*_missing(found), *_no_gradients(no_gradients)],
    }


def _part(part: Part, gradients: list[Gradients], plots: Path | None) -> dict[str, Any]:
    found = part.entries
    maps = heat_maps(found, plots)
    # The first order of each entry is shown, the others are a click away.
    first = [plot for plot in maps if not plot.name.partition("-order")[2] or plot.name.endswith("-order1")]
    return {
        "title": part.title,
        "findings": findings(found),
        "learning_title": "Learnt"
        if all(entry.single for entry in found)
        else "Learnt, and forgotten among the tasks",
        "learning": tables.learning_table(found),
        "keeping": tables.keeping_table(found),
        "probes": tables.probe_tables(found),
        "tasks": tables.task_table(found),
        "frontier": frontier_plots(found, plots),
        "matrices": first,
        "more_matrices": [plot for plot in maps if plot not in first],
        "curves": sequence_curves(found, plots),
        "gradients": gradient_plots(gradients, plots),
        "gradient_table": gradient_table(gradients),
        "resources": tables.resource_table(found),
    }


def _keys(homes: Sequence[ResultsFolder], found: Sequence[Entry]) -> list[tuple[str, str]]:
    backbones = dict.fromkeys(home.results.backbone for home in homes)
    return [
        ("Backbone", ", ".join(backbones)),
        ("Tasks", numbers.count(len(found[0].tasks))),
        ("Entries", numbers.count(len({entry.label for entry in found}))),
        ("Sequences", numbers.count(sum(len(entry.sequences) for entry in found))),
    ]


def _missing(found: Sequence[Entry]) -> list[str]:
    """Sequences that have not ended, and scores that nobody asked for or that went missing."""
    notes = []
    for entry in found:
        for sequence in entry.sequences:
            if not sequence.finished:
                done = f"{len(sequence.stages)} of {len(sequence.order)} tasks"
                state = "has diverged" if sequence.status == "diverged" else "is unfinished"
                notes.append(f"{sequence.label} {state} ({done}): its metrics are not counted.")
    for what in ("tasks", "probes"):
        names = [part.name for part in getattr(found[0].home.results, what)]
        unmeasured = [name for name in names if not any(_scored(entry, what, name) for entry in found)]
        if unmeasured:
            notes.append(f"No score was measured after training for these {what}: {', '.join(unmeasured)}.")
    return notes


def _scored(entry: Entry, what: str, name: str) -> bool:
    stages = [stage for sequence in entry.sequences for stage in sequence.stages]
    scores = [getattr(stage, what).get(name) for stage in stages]
    return any(score is not None and score.score is not None for score in scores)


def _no_gradients(files: Sequence[str]) -> list[str]:
    if not files:
        return []
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return [f"No gradient norms are in {files[0]}{more}: they are left out of the plots of gradients."]

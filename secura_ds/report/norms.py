"""The gradient norms that runs and task sequences have logged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from secura_ds.errors import UserError
from secura_ds.report.run_folder import read_runs
from secura_ds.report.sequence.entries import entries, parts
from secura_ds.report.sequence.folder import is_results_folder
from secura_ds.report.sequence.gradients import read_gradients
from secura_ds.report.sequence.page import read_results_folders


def logged_norms(folders: Sequence[Path]) -> dict[str, list[float]]:
    """L2 norms before clipping of all logged steps, by run, or by entry and tasks of a results folder.

    Raises:
        UserError: a folder is neither, both kinds are mixed, or one has logged no norm.
    """
    results = [folder for folder in folders if is_results_folder(folder)]
    if results and len(results) < len(folders):
        raise UserError(f"{results[0]} holds the results of task sequences: give run folders alone, or these")
    if results:
        split = parts(entries(read_results_folders(folders)))
        norms: dict[str, list[float]] = {}
        missing: list[str] = []
        for part in split:
            found, absent = read_gradients(part.entries)
            of = f", {part.title}" if len(split) > 1 else ""
            norms |= {gradients.entry.label + of: gradients.values for gradients in found}
            missing += absent
        if not norms:
            raise UserError(
                f"{results[0]} has logged no gradient norms (first {missing[0] if missing else '-'})"
            )
        return norms
    norms = {run.label: run.series("grad_norm")[1] for run in read_runs(folders)}
    for folder, values in zip(folders, norms.values(), strict=True):
        if not values:
            raise UserError(f"{folder}/metrics.jsonl has no gradient norms: give a run that has trained")
    return norms

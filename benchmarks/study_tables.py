"""The tables of docs/results: what each sequence of a results folder learnt and what it forgot.

Changes of probes are from the untouched model, with the standard error of paired items.

    python benchmarks/study_tables.py docs/results/smollm2-eight-tasks-small
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from secura_ds.continual import metrics
from secura_ds.continual.metrics import Estimate, score_matrix
from secura_ds.errors import run_command
from secura_ds.report import format_table
from secura_ds.report.sequence.folder import Measured, Probe, Results, TaskSequence, read_results

ALONE = ["order", "entry", "task loss"]
TOGETHER = ["order", "entry", "loss when learnt", "all at the end", "forgotten"]


def named(sequence: TaskSequence) -> str:
    """The entry with its rate, which its name holds where there are several."""
    rate = f", {sequence.learning_rate:g}"
    return sequence.entry.removesuffix(rate) + rate


def losses(results: Results, sequence: TaskSequence) -> list[str]:
    """Mean task loss when learnt, at the end, and the rise of all but the last since; one task: its loss."""
    before, stages = results.before.model_dump(), [stage.model_dump() for stage in sequence.stages]
    tasks = [task.model_dump() for task in results.tasks]
    matrix = score_matrix(before, stages, tasks, sequence.order, key="loss")
    end = metrics.average_score(matrix)
    if len(sequence.order) == 1:
        return [_number(end, 3)]
    learnt = Estimate(float(matrix.scores[1:].diagonal().mean()))
    return [_number(learnt, 2), _number(end, 2), _number(metrics.backward_transfer(matrix), 2, sign="+")]


def change(results: Results, probe: Probe, measured: Measured) -> Estimate | None:
    """A probe's change, in points or nats, with its paired error."""
    old, new = results.before.probes[probe.name], measured.probes[probe.name]
    if old.score is None or new.score is None:
        return None
    scale = 100 if probe.kind == "multiple_choice" else 1
    error = None if new.change_stderr is None else scale * new.change_stderr
    return Estimate(scale * (new.score - old.score), error)


def probe_cells(results: Results, sequence: TaskSequence, probe: Probe) -> list[str]:
    """The change at the end, and along several tasks the worst on the way; of questions also what is kept."""
    digits = 1 if probe.kind == "multiple_choice" else 3
    changes = [found for stage in sequence.stages if (found := change(results, probe, stage))]
    end = changes[-1]
    error = "" if end.stderr is None else f" ± {end.stderr:.{digits}f}"
    cells = [_number(end, digits, sign="+") + error]
    if len(sequence.order) > 1 and probe.kind == "multiple_choice":
        before = results.before.probes[probe.name].score
        assert before is not None and probe.chance is not None
        kept = metrics.retention(Estimate(before), Estimate(before + end.value / 100), probe.chance)
        cells += [f"{100 * kept.value:.0f} %" if kept else "-"]
        cells += [_number(min(changes, key=lambda found: found.value), digits, sign="+")]
    return cells


def _number(estimate: Estimate | None, digits: int, *, sign: str = "") -> str:
    return "-" if estimate is None else f"{estimate.value:{sign}.{digits}f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="a results folder of launch/continual.py")
    results = read_results(parser.parse_args(argv).results).results
    done = [sequence for sequence in results.sequences if sequence.finished]
    orders = list(dict.fromkeys(tuple(sequence.order) for sequence in done))
    done.sort(key=lambda sequence: orders.index(tuple(sequence.order)))
    rows = [
        [
            sequence.order[0] if len(sequence.order) == 1 else str(orders.index(tuple(sequence.order)) + 1),
            named(sequence),
            *losses(results, sequence),
            *(cell for probe in results.probes for cell in probe_cells(results, sequence, probe)),
        ]
        for sequence in done
    ]
    together = any(len(order) > 1 for order in orders)
    headers = list(TOGETHER if together else ALONE)
    for probe in results.probes:
        headers.append(probe.name)
        if together and probe.kind == "multiple_choice":
            headers += ["kept above chance", "lowest"]
    print(format_table(headers, rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))

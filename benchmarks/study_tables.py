"""The tables of docs/results: what each entry of a results folder learnt and what it forgot.

Seeds are one row, their mean; several orders of tasks have a row of their mean below. Changes of probes are
from the untouched model. Standard errors are those of items (paired with the untouched model for probes),
joined with the spread where there are several sequences.

    python benchmarks/study_tables.py docs/results/smollm2-eight-tasks-small
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from secura_ds.continual import metrics
from secura_ds.continual.metrics import Estimate, score_matrix
from secura_ds.errors import run_command
from secura_ds.report import format_table
from secura_ds.report.sequence.folder import Measured, Probe, Results, TaskSequence, read_results

ALONE = ["order", "entry", "seeds", "task loss"]
TOGETHER = ["order", "entry", "seeds", "loss when learnt", "all at the end", "forgotten"]


def named(sequence: TaskSequence) -> str:
    """The entry with its rate, which its name holds where there are several."""
    rate = f", {sequence.learning_rate:g}"
    return sequence.entry.removesuffix(rate) + rate


def losses(results: Results, sequence: TaskSequence) -> list[Estimate | None]:
    """Mean task loss when learnt, at the end, and the rise of all but the last since; one task: its loss."""
    before, stages = results.before.model_dump(), [stage.model_dump() for stage in sequence.stages]
    tasks = [task.model_dump() for task in results.tasks]
    matrix = score_matrix(before, stages, tasks, sequence.order, key="loss")
    end = metrics.average_score(matrix)
    if len(sequence.order) == 1:
        return [end]
    learnt = Estimate(float(matrix.scores[1:].diagonal().mean()))
    return [learnt, end, metrics.backward_transfer(matrix)]


def change(results: Results, probe: Probe, measured: Measured) -> Estimate | None:
    """A probe's change, in points or nats, with its paired error."""
    old, new = results.before.probes[probe.name], measured.probes[probe.name]
    if old.score is None or new.score is None:
        return None
    scale = 100 if probe.kind == "multiple_choice" else 1
    error = None if new.change_stderr is None else scale * new.change_stderr
    return Estimate(scale * (new.score - old.score), error)


def changes(results: Results, sequence: TaskSequence, probe: Probe) -> list[Estimate | None]:
    """The change at the end, and along several tasks the worst on the way; of questions also what is kept."""
    found = [value for stage in sequence.stages if (value := change(results, probe, stage))]
    end = found[-1]
    if len(sequence.order) == 1 or probe.kind != "multiple_choice":
        return [end]
    before = results.before.probes[probe.name].score
    assert before is not None and probe.chance is not None
    kept = metrics.retention(Estimate(before), Estimate(before + end.value / 100), probe.chance)
    share = None if kept is None else Estimate(100 * kept.value)
    return [end, share, Estimate(min(value.value for value in found))]


def written(seeds: Sequence[Estimate | None], digits: int, *, sign: str = "", errors: bool = True) -> str:
    """The mean over seeds with its error."""
    known = [value for value in seeds if value is not None]
    found = metrics.over_sequences(known)
    if found is None or len(known) < len(seeds):
        return "-"
    error = "" if found.stderr is None or not errors else f" ± {found.stderr:.{digits}f}"
    return f"{found.value:{sign}.{digits}f}{error}"


def row(results: Results, seeds: Sequence[TaskSequence]) -> list[str]:
    """The cells of one entry on one order, behind its name."""
    alone = len(seeds[0].order) == 1
    forms = [(3, "")] if alone else [(2, ""), (2, ""), (2, "+")]
    columns = list(zip(*(losses(results, sequence) for sequence in seeds), strict=True))
    cells = [
        written(column, digits, sign=sign, errors=len(seeds) > 1)
        for column, (digits, sign) in zip(columns, forms, strict=True)
    ]
    for probe in results.probes:
        columns = list(zip(*(changes(results, sequence, probe) for sequence in seeds), strict=True))
        shown = [(1, "+"), (0, ""), (1, "+")] if probe.kind == "multiple_choice" else [(3, "+")]
        pairs = zip(columns, shown, strict=False)
        cells += [written(column, digits, sign=sign) for column, (digits, sign) in pairs]
    return cells


def means(
    results: Results, groups: Mapping[tuple[int, str], Sequence[TaskSequence]], num_orders: int
) -> list[list[str]]:
    """A row of each entry that went through every order: the mean of all its sequences."""
    entries: dict[str, list[Sequence[TaskSequence]]] = {}
    for (_, name), seeds in groups.items():
        entries.setdefault(name, []).append(seeds)
    whole = {name: found for name, found in entries.items() if len(found) == num_orders}
    joined = {name: [sequence for seeds in found for sequence in seeds] for name, found in whole.items()}
    return [["mean", name, str(len(found)), *row(results, found)] for name, found in joined.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="a results folder of launch/continual.py")
    results = read_results(parser.parse_args(argv).results).results
    done = [sequence for sequence in results.sequences if sequence.finished]
    orders = list(dict.fromkeys(tuple(sequence.order) for sequence in done))
    groups: dict[tuple[int, str], list[TaskSequence]] = {}
    for sequence in sorted(done, key=lambda sequence: orders.index(tuple(sequence.order))):
        groups.setdefault((orders.index(tuple(sequence.order)), named(sequence)), []).append(sequence)
    rows = [
        [
            seeds[0].order[0] if len(seeds[0].order) == 1 else str(order + 1),
            name,
            str(len(seeds)),
            *row(results, seeds),
        ]
        for (order, name), seeds in groups.items()
    ]
    together = any(len(order) > 1 for order in orders)
    if together and len(orders) > 1:
        rows += means(results, groups, len(orders))
    headers = list(TOGETHER if together else ALONE)
    for probe in results.probes:
        headers.append(probe.name)
        if together and probe.kind == "multiple_choice":
            headers += ["kept above chance, %", "lowest"]
    print(format_table(headers, rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))

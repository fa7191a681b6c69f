"""The numbers behind the page: entries, probes, tasks and what everything cost."""

from __future__ import annotations

from collections.abc import Sequence

from secura_ds.continual.metrics import Estimate, Summary, over_sequences
from secura_ds.report import numbers
from secura_ds.report.sequence import measures
from secura_ds.report.sequence.entries import Entry, method_name
from secura_ds.report.sequence.folder import Probe, TaskSequence
from secura_ds.report.sequence.measures import Measure
from secura_ds.report.verdict import perplexity_change

Table = tuple[list[str], list[list[str]]]
"""Headers, and rows of as many cells; a row starts with its name."""

LEARNING = (
    (measures.AVERAGE, "Score at the end"),
    (measures.INCREMENTAL, "Score along the way"),
    (measures.PLASTICITY, "Gain when learnt"),
    (measures.FINAL_GAIN, "Gain at the end"),
    (measures.BACKWARD, "Backward transfer"),
    (measures.FORGETTING, "Forgetting (best − last)"),
    (measures.FORWARD, "Forward transfer"),
    (measures.INTRANSIGENCE, "Intransigence"),
    (measures.TASK_LOSS, "Task loss at the end"),
)
LEARNING_BY_LOSS = (
    (measures.LOSS_LEARNT, "Task loss, change when learnt"),
    (measures.LOSS_FORGOTTEN, "Rise since learnt"),
    (measures.TASK_LOSS, "Task loss at the end"),
)
LEARNING_OF_ONE = (
    (measures.AVERAGE, "Score"),
    (measures.PLASTICITY, "Gain"),
    (measures.TASK_LOSS, "Task loss"),
    (measures.LOSS_LEARNT, "Task loss, change"),
)
KEEPING = (
    (measures.RETENTION, "Knowledge kept above chance"),
    (measures.KNOWLEDGE, "Knowledge, change"),
    (measures.TEXT_LOSS, "Text loss, change"),
)


def learning_table(entries: Sequence[Entry]) -> Table:
    """What was learnt, transferred and forgotten among the tasks; columns that no entry has are left out."""
    if all(entry.single for entry in entries):
        return _measure_table(entries, LEARNING_OF_ONE)
    scored = any(measures.AVERAGE.of(entry) for entry in entries)
    return _measure_table(entries, LEARNING if scored else LEARNING_BY_LOSS)


def keeping_table(entries: Sequence[Entry]) -> Table:
    """Means over probes of a kind; empty where no kind has several, for then each probe's table says it."""
    kinds = [probe.kind for probe in entries[0].probes]
    return _measure_table(entries, KEEPING) if len(set(kinds)) < len(kinds) else ([], [])


def _measure_table(entries: Sequence[Entry], columns: Sequence[tuple[Measure, str]]) -> Table:
    used = [(measure, title) for measure, title in columns if any(measure.of(entry) for entry in entries)]
    if not used:
        return [], []
    headers = ["Entry", "Sequences"]
    headers += [f"{title}, {'%' if measure.unit == 'share' else measure.unit}" for measure, title in used]
    rows = [
        [
            entry.label,
            str(len(entry.finished)),
            *(measure.written(measure.of(entry)).replace(" %", "") for measure, _ in used),
        ]
        for entry in entries
        if entry.finished
    ]
    return headers, rows


def probe_tables(entries: Sequence[Entry]) -> list[tuple[str, Table]]:
    """Every probe's name, and each entry before and after all its tasks."""
    tables = []
    for probe in entries[0].probes:
        rows = [(entry, _probe_row(entry, probe)) for entry in entries]
        known = [[entry.label, *row] for entry, row in rows if row is not None]
        if known:
            ends = (
                ["Kept above chance", "After / before"] if probe.kind == "multiple_choice" else ["Perplexity"]
            )
            name = probe.name[:1].upper() + probe.name[1:].replace("_", " ")
            tables.append((name, (["Entry", "Before", "After", "Change", *ends], known)))
    return tables


def _probe_row(entry: Entry, probe: Probe) -> list[str] | None:
    before = entry.home.results.before.probes.get(probe.name)
    last = [s.stages[-1].probes[probe.name] for s in entry.finished if probe.name in s.stages[-1].probes]
    after = over_sequences([Estimate(p.score, p.stderr) for p in last if p.score is not None])
    difference = entry.summary("probes", probe.name, "change")
    if before is None or before.score is None or after is None or difference is None:
        return None
    old, new = Estimate(before.score, before.stderr), Estimate(after.value, after.stderr)
    share = probe.kind == "multiple_choice"
    row = [_number(old, share), _number(new, share), _number(difference, share, signed=True)]
    if not share:
        return [*row, perplexity_change(difference.value)]
    ratios = (entry.summary("probes", probe.name, key) for key in ("retention", "raw_ratio"))
    return row + [numbers.MISSING if ratio is None else _number(ratio, True) for ratio in ratios]


def _number(estimate: Estimate | Summary, share: bool, *, signed: bool = False) -> str:
    scale, digits = (100, 1) if share else (1, 3)
    text = numbers.decimal(scale * estimate.value, digits, signed=signed)
    if share:
        text += " points" if signed else " %"
    if estimate.stderr is None:
        return text
    return f"{text} ± {numbers.decimal(scale * estimate.stderr, digits)}"


def task_table(entries: Sequence[Entry]) -> Table:
    """Per task: its metric, its score before training and what each entry left of it at the end.

    Empty where only losses were measured.
    """
    trained = {task for entry in entries for sequence in entry.sequences for task in sequence.order}
    tasks = [task for task in entries[0].tasks if task.name in trained]
    before = entries[0].home.results.before.tasks
    rows = []
    for task in tasks:
        start = before.get(task.name)
        row = [
            task.name,
            task.metric.replace("_", " "),
            numbers.count(task.items),
            _score(start, task.maximum),
        ]
        for entry in entries:
            found = [s.stages[-1].tasks.get(task.name) for s in entry.finished if task.name in s.order]
            known = [Estimate(f.score, f.stderr) for f in found if f is not None and f.score is not None]
            joined = over_sequences(known)
            cell = numbers.MISSING
            if joined is not None:
                cell = _scored(Estimate(joined.value, joined.stderr), task.maximum)
            row.append(cell)
        if set(row[3:]) != {numbers.MISSING}:
            rows.append(row)
    return ["Task", "Metric", "Items", "Before", *(entry.label for entry in entries)], rows


def _score(found: object, maximum: float) -> str:
    score, stderr = getattr(found, "score", None), getattr(found, "stderr", None)
    return numbers.MISSING if score is None else _scored(Estimate(score, stderr), maximum)


def _scored(estimate: Estimate, maximum: float) -> str:
    """A score in its own unit: shares as %, points of 100 as they are."""
    if maximum == 1:
        return _number(estimate, True)
    error = "" if estimate.stderr is None else f" ± {numbers.decimal(estimate.stderr, 1)}"
    return f"{numbers.decimal(estimate.value, 1)}{error}"


def resource_table(entries: Sequence[Entry]) -> Table:
    """Settings and costs: means over an entry's sequences, of memory the largest."""
    headers = [
        "Entry", "Method", "Learning rate", "Trainable parameters", "Steps", "Tokens", "Training time",
        "Peak memory", "Replay buffer",
    ]  # fmt: skip
    rows = []
    for entry in entries:
        sequences = entry.finished or list(entry.sequences)
        peak = [s.train.peak_memory_bytes for q in sequences for s in q.stages if s.train.peak_memory_bytes]
        seconds = _mean_total(sequences, "seconds")
        rows.append([
            entry.label,
            method_name(entry.first),
            numbers.compact(entry.first.learning_rate),
            _or_missing(entry.first.trainable_parameters),
            _or_missing(_mean_total(sequences, "steps")),
            _or_missing(_mean_total(sequences, "tokens")),
            numbers.MISSING if seconds is None else numbers.duration(seconds),
            numbers.memory(max(peak)) if peak else numbers.MISSING,
            _buffer(sequences),
        ])  # fmt: skip
    return headers, rows


def _mean_total(sequences: Sequence[TaskSequence], key: str) -> float | None:
    """The sum over stages, mean over sequences; None if a stage lacks it."""
    values = [getattr(stage.train, key) for sequence in sequences for stage in sequence.stages]
    if not values or any(value is None for value in values):
        return None
    return float(sum(values)) / len(sequences)


def _or_missing(value: float | None) -> str:
    return numbers.MISSING if value is None else numbers.count(value)


def _buffer(sequences: Sequence[TaskSequence]) -> str:
    most = max(sequences, key=lambda sequence: sequence.buffer_bytes)
    if not most.buffer_examples and not most.buffer_bytes:
        return "none"
    return f"{numbers.count(most.buffer_examples)} examples, {numbers.memory(most.buffer_bytes)}"

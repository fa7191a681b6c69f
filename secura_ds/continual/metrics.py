"""Metrics of a task sequence, with standard errors; formulas and sources stand in docs/metrics.md.

R, shape (T+1, T), holds shares of each task's maximum: row 0 before training, row i after task i, columns in
training order. E, of the same shape, holds their standard errors. nan is what was not measured: a metric that
needs such a score is None, and one that needs such an error has the error None.

Nearly every metric is a weighted sum of scores. Scores of one task come from the same items, so their errors
go together, and nobody recorded how far. Of no correlation and a full one, that with the larger error is
taken: for a difference the root of the summed squares, for a sum the plain sum. Tasks are independent. A
probe's change is recorded with the error of its paired items.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from secura_ds.evaluation.metrics import bootstrap_stderr

CLEAR = 2.0
"""A probe must stand this many standard errors above chance before a retention ratio means anything."""


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, None where that is unknown."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class Summary:
    """An estimate over several sequences of one entry.

    `stderr` joins both sources: `seed_stderr`, standard deviation over sequences / sqrt(n), None for n = 1;
    `item_stderr`, the mean of the sequences' own errors. More sequences do not shrink the latter: all of them
    are scored on the same items.
    """

    value: float
    stderr: float | None
    n: int
    seed_stderr: float | None
    item_stderr: float | None


@dataclass(frozen=True)
class ScoreMatrix:
    """R and E (see above) of a sequence of `tasks`, in training order."""

    tasks: tuple[str, ...]
    scores: np.ndarray
    errors: np.ndarray

    def __post_init__(self) -> None:
        shape = (len(self.tasks) + 1, len(self.tasks))
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"a sequence needs at least one task and each of them once, not {self.tasks}")
        if self.scores.shape != shape or self.errors.shape != shape:
            given = f"{self.scores.shape} and {self.errors.shape}"
            raise ValueError(f"scores and errors are {given}: {len(self.tasks)} tasks need {shape}")

    def weighted(self, weights: np.ndarray) -> Estimate | None:
        """The sum of scores times `weights`, (T+1, T); scores of weight 0 need not be known."""
        used = weights != 0
        scores, errors = self.scores[used], self.errors[used]
        if not np.isfinite(scores).all():
            return None
        value = float(np.dot(weights[used], scores))
        if not np.isfinite(errors).all():
            return Estimate(value)
        terms = np.where(used, weights * self.errors, 0.0)
        by_task = np.maximum(np.linalg.norm(terms, axis=0), np.abs(terms.sum(axis=0)))
        return Estimate(value, float(np.linalg.norm(by_task)))


def score_matrix(
    before: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]],
    tasks: Sequence[Mapping[str, Any]],
    order: Sequence[str],
    *,
    key: str = "score",
) -> ScoreMatrix:
    """The matrix of a sequence in `continual.json` (docs/continual-results.md).

    Args:
        before: scores of the untouched backbone, `{"tasks": ...}`.
        stages: the sequence's stages; those not reached yet are rows of nan.
        tasks: the document's tasks, for each one's `maximum`, by which scores are divided.
        order: the sequence's tasks as trained.
        key: `score`, or `loss` for mean token losses, in nats and not divided.
    """
    scores = np.full((len(order) + 1, len(order)), np.nan)
    errors = scores.copy()
    maxima = {str(task["name"]): float(task["maximum"]) for task in tasks}
    error_key = "stderr" if key == "score" else f"{key}_stderr"
    for row, measured in enumerate([before, *stages[: len(order)]]):
        for column, name in enumerate(order):
            found = (measured.get("tasks") or {}).get(name) or {}
            scale = maxima[name] if key == "score" else 1.0
            scores[row, column] = _number(found.get(key)) / scale
            errors[row, column] = _number(found.get(error_key)) / scale
    return ScoreMatrix(tuple(order), scores, errors)


def average_score(matrix: ScoreMatrix) -> Estimate | None:
    """Mean score over all tasks at the end: mean_j R[T, j]. ACC of GEM (Lopez-Paz & Ranzato 2017)."""
    return _row_mean(matrix, len(matrix.tasks))


def average_incremental_score(matrix: ScoreMatrix) -> Estimate | None:
    """Mean over stages of the mean score of the tasks met so far: mean_i mean_{j<=i} R[i, j].

    iCaRL (Rebuffi et al. 2017), section 4, average incremental accuracy.
    """
    length = len(matrix.tasks)
    weights = np.zeros_like(matrix.scores)
    for i in range(1, length + 1):
        weights[i, :i] = 1 / (i * length)
    return matrix.weighted(weights)


def backward_transfer(matrix: ScoreMatrix) -> Estimate | None:
    """Mean over the tasks before the last of R[T, j] - R[j, j]; below 0 is forgetting. BWT of GEM.

    None for one task.
    """
    length = len(matrix.tasks)
    return _difference(matrix, [(length, j, j + 1) for j in range(length - 1)])


def forward_transfer(matrix: ScoreMatrix) -> Estimate | None:
    """Mean over the tasks after the first of R[j-1, j] - b_j. FWT of GEM. None for one task.

    GEM takes b from a network with random weights. Here training starts from a backbone, so b_j = R[0, j].
    """
    return _difference(matrix, [(j, j, 0) for j in range(1, len(matrix.tasks))])


def forgetting(matrix: ScoreMatrix) -> Estimate | None:
    """Mean over the tasks before the last of max_{1<=l<T} R[l, j] - R[T, j]. Chaudhry et al. 2018, section 3.

    The largest of several noisy scores lies above the truth, so this tends above 0 even where nothing was
    forgotten; `forgetting_diagonal` has no such bias. The error takes the row of the largest score as given.
    None for one task.
    """
    length = len(matrix.tasks)
    if length == 1 or not np.isfinite(matrix.scores[1:, :-1]).all():
        return None
    best = 1 + np.argmax(matrix.scores[1:length, :-1], axis=0)
    return _difference(matrix, [(int(row), j, length) for j, row in enumerate(best)])


def forgetting_diagonal(matrix: ScoreMatrix) -> Estimate | None:
    """Mean over the tasks before the last of R[j, j] - R[T, j]: `backward_transfer` with the other sign."""
    transfer = backward_transfer(matrix)
    return None if transfer is None else Estimate(0.0 - transfer.value, transfer.stderr)


def intransigence(matrix: ScoreMatrix, references: Mapping[str, Estimate]) -> Estimate | None:
    """Mean over tasks of a*_j - R[j, j]: what the sequence kept from being learnt.

    Chaudhry et al. 2018, section 3, where a* is a model trained on all tasks up to j together. Here
    `references` gives the score of each task trained alone from the same backbone, as a share. None unless
    every task has one.
    """
    length = len(matrix.tasks)
    diagonal = np.eye(length + 1, length, k=-1) / length
    learnt = matrix.weighted(diagonal)
    if learnt is None or any(name not in references for name in matrix.tasks):
        return None
    alone = mean_estimate([references[name] for name in matrix.tasks])
    assert alone is not None
    return Estimate(alone.value - learnt.value, _joined([alone.stderr, learnt.stderr]))


def plasticity(matrix: ScoreMatrix) -> Estimate | None:
    """What training taught: mean over tasks of R[j, j] - R[0, j], each task right after its own training."""
    return _difference(matrix, [(j + 1, j, 0) for j in range(len(matrix.tasks))])


def final_gain(matrix: ScoreMatrix) -> Estimate | None:
    """What is left of it at the end: mean over tasks of R[T, j] - R[0, j]."""
    length = len(matrix.tasks)
    return _difference(matrix, [(length, j, 0) for j in range(length)])


def retention(
    before: Estimate, after: Estimate, chance: float = 0.0, *, paired: float | None = None
) -> Estimate | None:
    """The part of a probe's score above chance that is left: (after - chance) / (before - chance).

    With chance 0 it is the raw ratio. None where the score before is not above chance by `CLEAR` standard
    errors: a ratio to noise means nothing. The error is a ratio's, to first order.

    Args:
        paired: standard error of after - before over the same items, from which follows how far both go
            together; without it they are taken as independent, mostly a bound from above.
    """
    base = before.value - chance
    if base <= CLEAR * (before.stderr or 0.0):
        return None
    ratio = (after.value - chance) / base
    if before.stderr is None or after.stderr is None:
        return Estimate(ratio)
    variance = after.stderr**2 + (ratio * before.stderr) ** 2
    if paired is not None:
        variance -= ratio * (before.stderr**2 + after.stderr**2 - paired**2)
    return Estimate(ratio, math.sqrt(max(variance, 0.0)) / base)


def change(before: Estimate, after: Estimate, *, paired: float | None = None) -> Estimate:
    """after - before: of a probe's score, or of a text's mean token loss in nats (above 0: it got worse).

    Its error is `paired` where that is known, else that of independent numbers.
    """
    error = _joined([after.stderr, before.stderr]) if paired is None else paired
    return Estimate(after.value - before.value, error)


def paired_stderr(before: Sequence[float], after: Sequence[float]) -> float:
    """Bootstrap standard error of the mean of after - before, each (items,), the same items in both."""
    return bootstrap_stderr(np.array(after, dtype=float) - np.array(before, dtype=float))


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate | None:
    """The mean of independent estimates, such as several probes of one model; None of none."""
    if not estimates:
        return None
    error = _joined([estimate.stderr for estimate in estimates])
    return Estimate(
        statistics.fmean(estimate.value for estimate in estimates),
        None if error is None else error / len(estimates),
    )


def over_sequences(estimates: Sequence[Estimate]) -> Summary | None:
    """One entry's sequences (seeds and orders) as one number; None of none."""
    if not estimates:
        return None
    values = [estimate.value for estimate in estimates]
    errors = [estimate.stderr for estimate in estimates if estimate.stderr is not None]
    items = statistics.fmean(errors) if len(errors) == len(values) else None
    seeds = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    known = [error for error in (items, seeds) if error is not None]
    return Summary(statistics.fmean(values), math.hypot(*known) if known else None, len(values), seeds, items)


def sequence_metrics(
    before: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]],
    tasks: Sequence[Mapping[str, Any]],
    probes: Sequence[Mapping[str, Any]],
    order: Sequence[str],
    *,
    references: Mapping[str, Estimate] | None = None,
) -> dict[str, Any]:
    """The `metrics` section of a finished sequence in `continual.json` (docs/continual-results.md).

    Args:
        before: scores of the untouched backbone: `{"tasks": ..., "probes": ...}`.
        stages: one per task, in training order.
        tasks: the document's tasks.
        probes: the document's probes.
        order: the sequence's tasks as trained.
        references: score of each task trained alone, as a share of its maximum, for intransigence.

    Returns:
        Per metric `{"value", "stderr"}`, or None where it is undefined or was not measured.

    Raises:
        ValueError: there are fewer stages than tasks.
    """
    if len(stages) != len(order):
        raise ValueError(f"{len(stages)} stages for {len(order)} tasks: the sequence is not finished")
    scores = score_matrix(before, stages, tasks, order)
    losses = score_matrix(before, stages, tasks, order, key="loss")
    found: dict[str, Estimate | None] = {
        "average_score": average_score(scores),
        "average_incremental_score": average_incremental_score(scores),
        "backward_transfer": backward_transfer(scores),
        "forward_transfer": forward_transfer(scores),
        "forgetting": forgetting(scores),
        "forgetting_diagonal": forgetting_diagonal(scores),
        "intransigence": intransigence(scores, references or {}),
        "plasticity": plasticity(scores),
        "final_gain": final_gain(scores),
        "task_loss": average_score(losses),
        "task_loss_change_learnt": plasticity(losses),
        "task_loss_change": final_gain(losses),
        "task_loss_forgotten": backward_transfer(losses),
    }
    by_probe = {str(p["name"]): _probe_metrics(before, stages[-1], p) for p in probes}
    kinds = {str(p["name"]): p["kind"] for p in probes}
    choices = [m for name, m in by_probe.items() if kinds[name] == "multiple_choice"]
    texts = [m for name, m in by_probe.items() if kinds[name] == "text_loss"]
    found["retention"] = _mean_of_all(choices, "retention")
    found["knowledge_change"] = _mean_of_all(choices, "change")
    found["text_loss_change"] = _mean_of_all(texts, "change")
    return {
        **{name: _plain(estimate) for name, estimate in found.items()},
        "probes": {name: {k: _plain(e) for k, e in inner.items()} for name, inner in by_probe.items()},
    }


def _probe_metrics(
    before: Mapping[str, Any], last: Mapping[str, Any], probe: Mapping[str, Any]
) -> dict[str, Estimate | None]:
    sides = [(side.get("probes") or {}).get(probe["name"]) for side in (before, last)]
    old, new = map(_estimate, sides)
    paired = (sides[1] or {}).get("change_stderr")
    difference = change(old, new, paired=paired) if old and new else None
    if probe["kind"] == "text_loss":
        return {"change": difference}
    chance = probe.get("chance")
    return {
        "change": difference,
        "retention": retention(old, new, chance, paired=paired)
        if old and new and chance is not None
        else None,
        "raw_ratio": retention(old, new, paired=paired) if old and new else None,
    }


def _mean_of_all(probes: Sequence[Mapping[str, Estimate | None]], key: str) -> Estimate | None:
    """The mean over probes; None if one of them lacks it, lest means over different probes be compared."""
    known = [estimate for probe in probes if (estimate := probe[key]) is not None]
    return mean_estimate(known) if len(known) == len(probes) else None


def _row_mean(matrix: ScoreMatrix, row: int) -> Estimate | None:
    weights = np.zeros_like(matrix.scores)
    weights[row] = 1 / len(matrix.tasks)
    return matrix.weighted(weights)


def _difference(matrix: ScoreMatrix, terms: Sequence[tuple[int, int, int]]) -> Estimate | None:
    """Mean over `terms` (plus, column, minus) of R[plus, column] - R[minus, column]; None of none."""
    if not terms:
        return None
    weights = np.zeros_like(matrix.scores)
    for plus, column, minus in terms:
        weights[plus, column] += 1 / len(terms)
        weights[minus, column] -= 1 / len(terms)
    return matrix.weighted(weights)


def _joined(errors: Sequence[float | None]) -> float | None:
    """The error of a sum of independent numbers; None if one error is unknown."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) if len(known) == len(errors) else None


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _estimate(fields: Mapping[str, Any] | None) -> Estimate | None:
    if not fields or fields.get("score") is None:
        return None
    return Estimate(float(fields["score"]), fields.get("stderr"))


def _plain(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else asdict(estimate)

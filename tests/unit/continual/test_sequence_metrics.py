"""Metrics of hand-computed score matrices, and what must hold for every matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from secura_ds.continual import metrics
from secura_ds.continual.metrics import Estimate, ScoreMatrix

R = [
    [0.1, 0.2, 0.0],
    [0.8, 0.3, 0.1],
    [0.9, 0.7, 0.2],
    [0.5, 0.6, 0.6],
]
"""Three tasks. The first is at its best after the second, so both kinds of forgetting differ."""


def matrix(scores: Any, error: float = 0.03) -> ScoreMatrix:
    values = np.array(scores, dtype=float)
    return ScoreMatrix(tuple(f"task{j}" for j in range(values.shape[1])), values, np.full_like(values, error))


def square(largest: float = 1.0) -> st.SearchStrategy[ScoreMatrix]:
    """A score matrix of one to six tasks."""
    values = st.floats(0, largest)
    shapes = st.integers(1, 6).map(lambda n: (n + 1, n))
    return shapes.flatmap(lambda shape: arrays(float, shape, elements=values)).map(matrix)


@pytest.mark.parametrize(
    ("metric", "value", "squares"),
    [
        (metrics.average_score, 1.7 / 3, 3 / 9),
        (metrics.average_incremental_score, (0.8 + 0.8 + 1.7 / 3) / 3, (11**2 + 5**2 + 2**2) / 18**2),
        (metrics.backward_transfer, ((0.5 - 0.8) + (0.6 - 0.7)) / 2, 4 / 4),
        (metrics.forward_transfer, ((0.3 - 0.2) + (0.2 - 0.0)) / 2, 4 / 4),
        (metrics.forgetting, ((0.9 - 0.5) + (0.7 - 0.6)) / 2, 4 / 4),
        (metrics.forgetting_diagonal, ((0.8 - 0.5) + (0.7 - 0.6)) / 2, 4 / 4),
        (metrics.plasticity, (0.7 + 0.5 + 0.6) / 3, 6 / 9),
        (metrics.final_gain, (0.4 + 0.4 + 0.6) / 3, 6 / 9),
    ],
)
def test_a_matrix_computed_by_hand(
    metric: Callable[[ScoreMatrix], Estimate | None], value: float, squares: float
) -> None:
    found = metric(matrix(R))
    assert found is not None and found.value == pytest.approx(value)
    assert found.stderr == pytest.approx(0.03 * math.sqrt(squares))


def test_different_errors_are_weighted() -> None:
    errors = np.zeros((4, 3))
    errors[3, 0], errors[1, 0], errors[2, 2] = 0.06, 0.08, 5.0
    found = metrics.backward_transfer(ScoreMatrix(("a", "b", "c"), np.array(R), errors))
    assert found is not None and found.stderr == pytest.approx(0.05)


def test_intransigence_against_each_task_alone() -> None:
    references = {f"task{j}": Estimate(score, 0.04) for j, score in enumerate((0.9, 0.9, 0.6))}
    found = metrics.intransigence(matrix(R), references)
    assert found is not None and found.value == pytest.approx((0.1 + 0.2 + 0.0) / 3)
    assert found.stderr == pytest.approx(math.sqrt(3) / 3 * 0.05)
    del references["task1"]
    assert metrics.intransigence(matrix(R), references) is None


def test_one_task_has_neither_transfer_nor_forgetting() -> None:
    one = matrix([[0.1], [0.7]])
    pairs = (metrics.backward_transfer, metrics.forward_transfer, metrics.forgetting)
    assert [metric(one) for metric in (*pairs, metrics.forgetting_diagonal)] == [None] * 4
    gain = metrics.plasticity(one)
    assert gain == metrics.final_gain(one) and gain is not None and gain.value == pytest.approx(0.6)


def test_what_was_not_measured_makes_only_its_own_metrics_unknown() -> None:
    values = np.array(R)
    values[1, 1:] = values[2, 2] = np.nan  # only tasks met so far were scored
    found = matrix(values)
    assert metrics.forward_transfer(found) is None and metrics.forgetting(found) is None
    assert metrics.average_incremental_score(found) is not None
    found.errors[0, 0] = np.nan
    gain = metrics.plasticity(found)
    assert gain is not None and gain.stderr is None
    average = metrics.average_score(found)
    assert average is not None and average.stderr is not None


def test_a_matrix_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 tasks need \(4, 3\)"):
        ScoreMatrix(("a", "b", "c"), np.zeros((3, 3)), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="each of them once"):
        ScoreMatrix(("a", "a"), np.zeros((3, 2)), np.zeros((3, 2)))


@given(square())
def test_forgetting_is_never_below_its_diagonal_variant(found: ScoreMatrix) -> None:
    most, diagonal = metrics.forgetting(found), metrics.forgetting_diagonal(found)
    assert (most is None) == (diagonal is None) == (len(found.tasks) == 1)
    if most and diagonal:
        assert most.value >= diagonal.value - 1e-12


@given(square())
def test_what_stays_as_it_was_learnt_is_not_forgotten(found: ScoreMatrix) -> None:
    for j in range(len(found.tasks)):
        found.scores[j + 1 :, j] = found.scores[j + 1, j]
        found.scores[: j + 1, j] = np.minimum(found.scores[: j + 1, j], found.scores[j + 1, j])
    for metric in (metrics.forgetting, metrics.forgetting_diagonal, metrics.backward_transfer):
        value = metric(found)
        assert value is None or value.value == pytest.approx(0.0, abs=1e-12)
    assert metrics.plasticity(found) == metrics.final_gain(found)


@given(square(0.5), st.floats(0, 0.5))
def test_a_constant_moves_averages_and_nothing_else(found: ScoreMatrix, by: float) -> None:
    moved = matrix(found.scores + by)
    for metric in (metrics.average_score, metrics.average_incremental_score):
        old, new = metric(found), metric(moved)
        assert old and new and new.value == pytest.approx(old.value + by)
    for change in (
        metrics.backward_transfer,
        metrics.forward_transfer,
        metrics.forgetting,
        metrics.plasticity,
        metrics.final_gain,
    ):
        old, new = change(found), change(moved)
        assert (old is None) == (new is None)
        assert old is None or new is None or new.value == pytest.approx(old.value, abs=1e-9)


@given(square())
def test_gain_splits_into_plasticity_and_backward_transfer(found: ScoreMatrix) -> None:
    length = len(found.tasks)
    learnt, left, lost = (
        m(found) for m in (metrics.plasticity, metrics.final_gain, metrics.backward_transfer)
    )
    assert learnt and left
    share = 0.0 if lost is None else lost.value * (length - 1) / length
    assert left.value == pytest.approx(learnt.value + share, abs=1e-9)


def test_retention_is_measured_from_chance() -> None:
    before, after = Estimate(0.85, 0.02), Estimate(0.55, 0.04)
    kept = metrics.retention(before, after, 0.25)
    assert kept is not None and kept.value == pytest.approx(0.5)
    assert kept.stderr == pytest.approx(math.hypot(0.04, 0.5 * 0.02) / 0.6)
    raw = metrics.retention(before, after)
    assert raw is not None and raw.value == pytest.approx(0.55 / 0.85)
    assert metrics.retention(Estimate(0.28, 0.02), after, 0.25) is None
    assert metrics.retention(Estimate(0.20), after, 0.25) is None
    assert metrics.change(before, after) == Estimate(
        pytest.approx(-0.3), pytest.approx(math.hypot(0.02, 0.04))
    )


@given(st.floats(0.3, 1), st.floats(0, 1), st.floats(0, 0.25))
def test_a_probe_that_did_not_move_is_kept_whole(before: float, after: float, chance: float) -> None:
    kept = metrics.retention(Estimate(before, 0.01), Estimate(before, 0.01), chance)
    assert kept is not None and kept.value == pytest.approx(1.0)
    other = metrics.retention(Estimate(before, 0.01), Estimate(after, 0.01), chance)
    assert other is not None and (other.value > 1) == ((after - chance) / (before - chance) > 1)


def test_a_paired_error_tells_how_far_both_scores_go_together() -> None:
    """Checked against the items: 40 questions, of which 2 were lost and 1 was won."""
    before = [1.0] * 30 + [0.0] * 10
    after = [0.0] * 2 + [1.0] * 28 + [1.0] + [0.0] * 9
    paired = metrics.paired_stderr(before, after)
    differences = np.array(after) - np.array(before)
    assert paired == pytest.approx(differences.std() / math.sqrt(40), rel=0.08)
    old, new = (Estimate(np.mean(s), np.std(s) / math.sqrt(40)) for s in (before, after))
    alone = metrics.change(old, new)
    assert metrics.change(old, new, paired=paired) == Estimate(alone.value, paired)
    assert alone.stderr is not None and alone.stderr > 2 * paired
    kept = metrics.retention(old, new, 0.25, paired=differences.std() / math.sqrt(40))
    # The ratio's error to first order, from the items themselves.
    by_items = (np.array(after) - 0.25) - kept.value * (np.array(before) - 0.25)
    assert kept.stderr == pytest.approx(by_items.std() / math.sqrt(40) / (0.75 - 0.25))
    assert metrics.retention(old, old, 0.25, paired=0.0) == Estimate(1.0, 0.0)


def test_sequences_of_an_entry_are_joined() -> None:
    summary = metrics.over_sequences([Estimate(0.5, 0.03), Estimate(0.6, 0.05), Estimate(0.7, 0.04)])
    assert summary is not None and summary.n == 3 and summary.value == pytest.approx(0.6)
    assert summary.seed_stderr == pytest.approx(0.1 / math.sqrt(3))
    assert summary.item_stderr == pytest.approx(0.04)
    assert summary.stderr == pytest.approx(math.hypot(0.1 / math.sqrt(3), 0.04))
    one = metrics.over_sequences([Estimate(0.5, 0.03)])
    assert one == metrics.Summary(0.5, 0.03, 1, None, 0.03)
    unknown = metrics.over_sequences([Estimate(0.5), Estimate(0.5)])
    assert unknown is not None and (unknown.stderr, unknown.item_stderr) == (0.0, None)
    assert metrics.over_sequences([]) is None


TASKS = [
    {"name": "orders", "metric": "exact_match", "maximum": 1.0, "chance": 0.0, "items": 100},
    {"name": "german", "metric": "bleu", "maximum": 100.0, "chance": 0.0, "items": 50},
]
PROBES = [
    {"name": "facts", "kind": "multiple_choice", "chance": 0.25, "items": 100},
    {"name": "general", "kind": "text_loss", "chance": None, "items": 40},
]


def measured(orders: float, german: float | None, facts: float, general: float) -> dict[str, Any]:
    def fields(score: float | None, stderr: float) -> dict[str, Any]:
        return {"score": score, "stderr": stderr, "loss": 2.0, "loss_stderr": None}

    return {
        "task": "any",
        "tasks": {"orders": fields(orders, 0.03), "german": fields(german, 2.0)},
        "probes": {
            "facts": {"score": facts, "stderr": 0.02},
            "general": {"score": general, "stderr": 0.03},
        },
    }


def test_forgetting_of_losses_is_their_rise_since_learnt() -> None:
    before = measured(0.1, 5.0, 0.85, 2.5)
    stages = [measured(0.2, 30.0, 0.75, 2.6), measured(0.9, 25.0, 0.55, 2.9)]
    stages[0]["tasks"]["german"]["loss"], stages[1]["tasks"]["german"]["loss"] = 1.25, 1.5
    found = metrics.sequence_metrics(before, stages, TASKS, PROBES, ["german", "orders"])
    assert found["task_loss_forgotten"]["value"] == pytest.approx(0.25)


def test_the_section_of_a_sequence() -> None:
    before = measured(0.1, 5.0, 0.85, 2.5)
    stages = [measured(0.2, 30.0, 0.75, 2.6), measured(0.9, 25.0, 0.55, 2.9)]
    found = metrics.sequence_metrics(before, stages, TASKS, PROBES, ["german", "orders"])
    values = {k: v["value"] for k, v in found.items() if v is not None and "value" in v}
    assert values == pytest.approx(
        {
            "average_score": (0.9 + 0.25) / 2,
            "average_incremental_score": (0.30 + (0.9 + 0.25) / 2) / 2,
            "backward_transfer": -0.05,
            "forward_transfer": 0.1,
            "forgetting": 0.05,
            "forgetting_diagonal": 0.05,
            "plasticity": (0.25 + 0.8) / 2,
            "final_gain": (0.2 + 0.8) / 2,
            "task_loss": 2.0,
            "task_loss_change_learnt": 0.0,
            "task_loss_change": 0.0,
            "task_loss_forgotten": 0.0,
            "retention": 0.5,
            "knowledge_change": -0.3,
            "text_loss_change": 0.4,
        }
    )
    assert found["intransigence"] is None and found["task_loss"]["stderr"] is None
    assert found["backward_transfer"]["stderr"] == pytest.approx(math.hypot(0.02, 0.02))
    assert found["probes"]["facts"]["raw_ratio"]["value"] == pytest.approx(0.55 / 0.85)
    assert found["probes"]["general"] == {
        "change": {"value": pytest.approx(0.4), "stderr": pytest.approx(0.03 * math.sqrt(2))}
    }


def test_scores_that_were_not_asked_for_are_null_in_the_section() -> None:
    before, after = measured(0.1, None, 0.85, 2.5), measured(0.9, None, 0.8, 2.5)
    del after["probes"]["facts"]
    found = metrics.sequence_metrics(before, [after, after], TASKS, PROBES, ["orders", "german"])
    assert found["average_score"] is None and found["retention"] is None
    assert found["probes"]["facts"] == {"change": None, "retention": None, "raw_ratio": None}
    assert found["text_loss_change"]["value"] == 0.0
    with pytest.raises(ValueError, match="1 stages for 2 tasks"):
        metrics.sequence_metrics(before, [after], TASKS, PROBES, ["orders", "german"])


@given(square(), st.lists(st.floats(-1, 1), min_size=42, max_size=42), st.floats(0, 1))
def test_errors_bound_every_correlation_within_a_task(
    found: ScoreMatrix, numbers: list[float], correlation: float
) -> None:
    weights = np.array(numbers[: found.scores.size]).reshape(found.scores.shape)
    estimate = found.weighted(weights)
    terms = weights * found.errors
    variance = (1 - correlation) * (terms**2).sum(axis=0) + correlation * terms.sum(axis=0) ** 2
    assert estimate is not None and estimate.stderr is not None
    assert estimate.stderr >= math.sqrt(variance.sum()) - 1e-9

"""What is said about entries, and that it is never more than their errors allow."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from fake_continual import make_continual, make_frontier

from secura_ds.report.sequence.entries import Entry, entries, lines
from secura_ds.report.sequence.folder import read_results
from secura_ds.report.sequence.labels import _spread
from secura_ds.report.sequence.matched import matched
from secura_ds.report.sequence.measures import KNOWLEDGE, PLASTICITY, TASK_LOSS, TEXT_LOSS, compare, ranked
from secura_ds.report.sequence.verdict import findings


def study(folder: Path, scores: dict[str, list[float]], *, knowledge: float = 0.9) -> list[Entry]:
    """Entries with one task, whose sequences ended with `scores`; every error is 0.03."""
    make_continual(folder, tasks=1, entries=len(scores), seeds=len(next(iter(scores.values()))), runs=False)
    file = folder / "continual.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    document["before"] = measured(0.1, 0.9)
    given = [(name, score) for name, values in scores.items() for score in values]
    for sequence, (name, score) in zip(document["sequences"], given, strict=True):
        sequence["entry"] = name
        sequence["stages"][0] |= measured(score, knowledge)
    file.write_text(json.dumps(document), encoding="utf-8")
    return entries([read_results(folder)])


def measured(task: float, knowledge: float) -> dict[str, Any]:
    return {
        "tasks": {"orders": {"score": task, "stderr": 0.03, "loss": None, "loss_stderr": None}},
        "probes": {"knowledge": {"score": knowledge, "stderr": 0.03}},
    }


def test_a_clear_lead_over_several_sequences_is_called_one(tmp_path: Path) -> None:
    found = study(tmp_path / "r", {"a": [0.5, 0.5, 0.5], "b": [0.9, 0.9, 0.9]})
    first = findings(found)[0]
    assert first.mark == "good"
    assert first.text == (
        "b learnt most: mean gain right after training +80.0 ± 4.2 points; next is a with +40.0 ± 4.2, "
        "ahead by 40.0 points ± 4.2, more than 2 standard errors."
    )


def test_one_sequence_is_never_a_result(tmp_path: Path) -> None:
    found = study(tmp_path / "r", {"a": [0.5], "b": [0.9]})
    said = findings(found)
    assert {finding.mark for finding in said} == {"even"}
    assert said[-1].text.startswith("There is one sequence each: another seed or order may turn this round.")


def test_a_lead_in_the_noise_is_not_called_clear(tmp_path: Path) -> None:
    found = study(tmp_path / "r", {"a": [0.5, 0.8, 0.65], "b": [0.6, 0.9, 0.75]})
    first = findings(found)[0]
    assert first.mark == "even" and first.text.endswith("no clear difference (within 2 standard errors).")


def test_the_backbones_own_error_does_not_blur_a_comparison(tmp_path: Path) -> None:
    found = study(tmp_path / "r", {"a": [0.5], "b": [0.6]})
    (best, gain), (other, _) = ranked(found, PLASTICITY)
    assert gain.stderr == pytest.approx(0.03 * 2**0.5)
    lead = compare(best, other, PLASTICITY)
    assert (lead.lead, lead.stderr) == (pytest.approx(0.1), pytest.approx(0.03 * 2**0.5))
    assert KNOWLEDGE.written(KNOWLEDGE.of(best)) == "0.0 ± 4.2"


def test_a_missing_error_is_said_and_never_clear(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    study(folder, {"a": [0.5], "b": [0.9]})
    text = (folder / "continual.json").read_text(encoding="utf-8").replace('"stderr": 0.03', '"stderr": null')
    (folder / "continual.json").write_text(text, encoding="utf-8")
    first = findings(entries([read_results(folder)]))[0]
    assert (first.mark, first.text) == (
        "even",
        "b learnt most: mean gain right after training +80.0 points; next is a with +40.0, "
        "ahead by 40.0 points, its standard error is unknown.",
    )


def test_no_entry_that_another_beats_on_both_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    study(folder, {"a": [0.5], "b": [0.9], "c": [0.4]})
    document = json.loads((folder / "continual.json").read_text(encoding="utf-8"))
    for sequence, kept in zip(document["sequences"], (0.8, 0.6, 0.7), strict=True):
        sequence["stages"][0]["probes"]["knowledge"]["score"] = kept
    (folder / "continual.json").write_text(json.dumps(document), encoding="utf-8")
    texts = [finding.text for finding in findings(entries([read_results(folder)]))]
    assert any("no other entry beats a and b in both" in text for text in texts)


def test_lines_are_read_off_at_the_same_task_loss(tmp_path: Path) -> None:
    folder = make_frontier(tmp_path / "r", methods=2, rates=(1e-4, 1e-3))
    document = json.loads((folder / "continual.json").read_text(encoding="utf-8"))
    # Task loss and text loss: SECURA from (2, 3.2) to (1, 3.4), LoRA from (1.8, 3.3) to (0.8, 3.9).
    points = [(2.0, 3.2), (1.0, 3.4), (1.8, 3.3), (0.8, 3.9)]
    for sequence, (task, text) in zip(document["sequences"], points, strict=True):
        sequence["stages"][0]["tasks"]["orders"] |= {"loss": task, "loss_stderr": 0.0}
        sequence["stages"][0]["probes"]["general_text"] |= {"score": text, "stderr": 0.02}
    (folder / "continual.json").write_text(json.dumps(document), encoding="utf-8")
    at = matched(lines(entries([read_results(folder)])), TASK_LOSS, TEXT_LOSS)
    # Straight lines over the logarithm of the loss, read off in the middle of what both span.
    place = math.sqrt(1.0 * 1.8)
    assert at is not None and at.across == pytest.approx(place)
    (secura, kept), (lora, lost) = at.values
    assert (secura.label, lora.label) == ("SECURA", "LoRA")
    parts = math.log(2.0 / place) / math.log(2.0 / 1.0), math.log(1.8 / place) / math.log(1.8 / 0.8)
    assert kept.value == pytest.approx(0.04 + parts[0] * 0.2)
    assert lost.value == pytest.approx(0.14 + parts[1] * 0.6)
    assert kept.stderr == pytest.approx(0.02)
    assert matched(lines(entries([read_results(folder)]))[:1], TASK_LOSS, TEXT_LOSS) is None


def test_lines_without_a_common_loss_are_not_compared(tmp_path: Path) -> None:
    folder = make_frontier(tmp_path / "r", methods=2, rates=(1e-4, 1e-3))
    document = json.loads((folder / "continual.json").read_text(encoding="utf-8"))
    for sequence, task in zip(document["sequences"], (2.0, 1.9, 1.0, 0.8), strict=True):
        sequence["stages"][0]["tasks"]["orders"]["loss"] = task
    (folder / "continual.json").write_text(json.dumps(document), encoding="utf-8")
    found = entries([read_results(folder)])
    assert matched(lines(found), TASK_LOSS, TEXT_LOSS) is None
    assert any("none are compared at equal loss" in finding.text for finding in findings(found))


def test_line_ends_are_pushed_apart_within_the_axis() -> None:
    assert _spread([0.0, 0.01, 0.5], 0.1, 0.0, 1.0) == pytest.approx([0.0, 0.1, 0.5])
    assert _spread([0.9, 0.95, 1.0], 0.1, 0.0, 1.0) == pytest.approx([0.8, 0.9, 1.0])


def test_a_line_through_rates_is_named_without_one(tmp_path: Path) -> None:
    """Where settings differ in more than a name has room for, the recipe's own names tell them apart."""
    folder = make_frontier(tmp_path / "r", methods=3, rates=(1e-4, 1e-3))
    document = json.loads((folder / "continual.json").read_text(encoding="utf-8"))
    settings = [
        {"a": 1, "b": 1, "c": 1, "d": 1},
        {"a": 1, "b": 1, "c": 1, "d": 2},
        {"a": 2, "b": 2, "c": 2, "d": 1},
    ]
    for number, sequence in enumerate(document["sequences"]):
        name = f"mine-{number // 2}, {sequence['learning_rate']:g}"
        sequence |= {"method": "secura", "settings": settings[number // 2], "entry": name}
    (folder / "continual.json").write_text(json.dumps(document), encoding="utf-8")
    assert [line.label for line in lines(entries([read_results(folder)]))] == ["mine-0", "mine-1", "mine-2"]

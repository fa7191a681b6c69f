"""Scores out of evaluation documents, and what is said about them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from fake_run import MERGE, evaluation, make_run

from secura_ds.report import verdict
from secura_ds.report.run_folder import read_run, read_runs
from secura_ds.report.scores import all_scores, part_scores, task_score


def test_scores_carry_errors_chance_and_unit() -> None:
    scores = all_scores(evaluation(0.9, 0.8, 2.5, before=False))
    assert list(scores) == ["task", "probes.facts", "probes.general_text"]
    assert scores["task"].text() == "90.0 % ± 2.4" and scores["task"].chance is None
    assert (scores["probes.facts"].chance, scores["probes.facts"].n) == (0.25, 120)
    assert (scores["probes.general_text"].unit, scores["probes.general_text"].text()) == (
        "nats",
        "2.500 ± 0.031",
    )
    other = all_scores(evaluation(0.4, 0.8, 2.5, before=True))["task"]
    assert scores["task"].change_text(other) == "+50.0 points"
    assert scores["task"].change_stderr(other) == pytest.approx(math.sqrt((0.09 + 0.24) / 160))


def test_the_same_items_make_a_paired_error() -> None:
    losses = [2.0, 3.0, 4.0, 3.5]
    before, after = (
        all_scores({"probes": {"text": {"mean_token_loss": sum(x) / 4, "stderr": 0.4, "n": 4, "items": x}}})
        for x in (losses, [loss + rise for loss, rise in zip(losses, (0.0, 0.1, 0.1, 0.2), strict=True)])
    )
    old, new = before["probes.text"], after["probes.text"]
    assert new.change(old) == pytest.approx(0.1)
    assert new.change_stderr(old) == pytest.approx(math.sqrt(0.02 / 3) / 2)
    assert (
        verdict._finding(old, new).text
        == "Loss on text rose by 0.100 ± 0.041 nats per token (perplexity +10.5 %)."
    )
    assert verdict._finding(old, new).mark == "bad"
    unlisted = all_scores({"probes": {"text": {"mean_token_loss": 3.0, "stderr": 0.3}}})["probes.text"]
    assert unlisted.paired_stderr(old) is None and unlisted.change_stderr(old) == pytest.approx(0.5)


def test_bleu_is_in_points() -> None:
    score = task_score({"task": {"metric": "bleu", "score": 31.25, "stderr": 0.5, "n": 10}})
    assert score is not None and (score.unit, score.text()) == ("points", "31.2 ± 0.5")


def test_documents_without_scores_give_none() -> None:
    assert (
        all_scores(None) == {} and all_scores({"task": None, "probes": {"x": {"score": float("nan")}}}) == {}
    )


def test_topics_are_read() -> None:
    parts = part_scores(evaluation(0.9, 0.8, 2.5, before=False), "facts")
    assert {name: round(score.value, 2) for name, score in parts.items()} == {
        "capitals": 0.84,
        "elements": 0.76,
    }


def test_the_verdict_of_a_good_run(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", steps=3, blocks=1))
    assert [(finding.mark, finding.text) for finding in verdict.findings(run)] == [
        ("good", "JSON exact match on the task went from 1.2 % to 91.2 %."),
        ("good", "Facts: 91.7 % before, 90.0 % after: kept (the change is within 2 standard errors)."),
        ("even", "Loss on general text rose by 0.013 nats per token (perplexity +1.3 %)."),
    ]
    cards = {card.title: (card.value, card.details) for card in verdict.cards(run)}
    assert cards["Task: JSON exact match"] == ("1.2 % → 91.2 %", ["change +90.0 points ± 2.4", "160 items"])
    assert cards["Facts"][1][-1] == "chance 25.0 %"
    assert cards["General text"] == (
        "+0.013",
        ["nats per token, 2.711 → 2.724", "perplexity +1.3 %", "40 items"],
    )
    assert cards["Wall time"] == ("4 min 12 s", ["3 steps", "153,216 tokens"])
    assert cards["Peak memory"][0] == "2.34 GiB" and cards["Trainable parameters"][0] == "737,280"


def test_forgetting_is_said(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", method="lora", steps=3, blocks=1))
    assert ("bad", "Facts: 91.7 % before, 73.3 % after: partly forgotten.") in [
        (finding.mark, finding.text) for finding in verdict.findings(run)
    ]


def test_a_change_in_the_noise_is_not_called_learning() -> None:
    before, after = (all_scores(evaluation(x, 0.9, 2.7, before=True))["task"] for x in (0.50, 0.55))
    assert verdict._finding(before, after).mark == "even"
    assert verdict._finding(before, after).text.endswith("no clear change.")


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = read_runs(
        [
            make_run(tmp_path / "secura", steps=3, blocks=1),
            make_run(tmp_path / "lora", method="lora", name="lora", steps=3, blocks=1),
        ]
    )
    headers, rows = verdict.score_table(runs)
    assert headers == ["Score", "smollm2-135m", "lora", "Items", "Chance"]
    assert rows[1] == ["Facts", "91.7 % → 90.0 % ± 2.7", "91.7 % → 73.3 % ± 4.0", "120", "25.0 %"]
    facts = {row[0]: row[1:] for row in verdict.fact_rows(runs)}
    assert facts["Method"] == [
        "SECURA, M2, r 64, m 96, calibrated factors, S-MagNorm at forward",
        "LoRA, rank 8",
    ]
    assert facts["Steps"] == ["3", "3"]


def test_the_merge_line() -> None:
    assert verdict.merge_line(MERGE) == (
        "Adapter model and merged model differ by at most 0.00021 in any logit (KL 3.1e−9 nats per token)."
    )
    skipped = {"max_logit_gap": None, "kl": None, "check_skipped": "it was left out"}
    assert (
        verdict.merge_line(skipped)
        == "The merged model was not compared with the adapter model: it was left out."
    )
    assert verdict.merge_line(None) is None
    for onto, expected in (
        ("trained", "The update is on the 4-bit weights that training saw, dequantized."),
        ("original", "The update is on the base's own weights; training saw them rounded to 4 bits."),
    ):
        line = verdict.merge_line({**MERGE, "trained_in_4_bits": True, "onto": onto})
        assert line is not None and line.endswith(f"nats per token). {expected}")

"""The outcome of a run in a few sentences and cards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secura_ds.report import numbers
from secura_ds.report.run_folder import RunFolder
from secura_ds.report.scores import Score, all_scores

CLEAR = 2.0
"""A difference counts as clear from this many standard errors on."""


SMALL_LOSS = 0.05
"""A rise of general-text loss below this, nats per token (perplexity +5 %), is shown as a small cost."""

METHOD_NAMES = {
    "secura": "SECURA",
    "cabr": "CABR-LoRA",
    "cur-lora": "CURLoRA",
    "lora": "LoRA",
    "dora": "DoRA",
    "corda": "CorDA",
    "osf": "OSF",
    "full": "Full fine-tuning",
}


@dataclass(frozen=True)
class Finding:
    """One sentence of the verdict; `mark` is `good`, `bad` or `even`."""

    mark: str
    text: str


@dataclass(frozen=True)
class Card:
    """One headline number."""

    title: str
    value: str
    details: list[str]


def findings(run: RunFolder) -> list[Finding]:
    """What was learnt and what was kept, in sentences; [] unless evaluated before and after."""
    before, after = all_scores(run.before), all_scores(run.after)
    return [_finding(before[name], score) for name, score in after.items() if name in before]


def _finding(before: Score, after: Score) -> Finding:
    change, error = after.change(before), after.change_stderr(before)
    clear = error is None or abs(change) > CLEAR * error
    if after.kind == "task":
        metric = after.label.removeprefix("Task: ")
        metric = metric[:1].upper() + metric[1:]
        text = f"{metric} on the task went from {before.value_text()} to {after.value_text()}"
        if not clear:
            return Finding("even", f"{text}: no clear change.")
        return Finding("good" if change > 0 else "bad", f"{text}.")
    if after.kind == "probe":
        text = f"{_titled(after)}: {before.value_text()} before, {after.value_text()} after"
        if not clear:
            return Finding("good", f"{text}: kept (the change is within {CLEAR:g} standard errors).")
        return Finding(
            "good" if change > 0 else "bad", f"{text}: {'risen' if change > 0 else 'partly forgotten'}."
        )
    direction = "rose" if change > 0 else "fell"
    paired = after.paired_stderr(before)
    size = numbers.decimal(abs(change)) + ("" if paired is None else f" ± {numbers.decimal(paired)}")
    text = f"Loss on {_named(after)} {direction} by {size} nats per token"
    mark = "good" if change <= 0 else "even" if change < SMALL_LOSS else "bad"
    return Finding(mark, f"{text} (perplexity {perplexity_change(change)}).")


def perplexity_change(loss_change: float) -> str:
    """The relative change of perplexity that a change of mean loss (nats per token) means: `+1.3 %`."""
    return f"{numbers.decimal(100 * math.expm1(min(loss_change, 50.0)), 1, signed=True)} %"


def _named(score: Score) -> str:
    return score.label.replace("_", " ")


def _titled(score: Score) -> str:
    name = _named(score)
    return name[:1].upper() + name[1:]


def cards(run: RunFolder) -> list[Card]:
    """Headline numbers: scores first, then what the run cost."""
    before, after = all_scores(run.before), all_scores(run.after)
    result = [_score_card(before.get(name), after.get(name)) for name in dict.fromkeys([*before, *after])]
    return result + cost_cards(run)


def _score_card(before: Score | None, after: Score | None) -> Card:
    score = after or before
    assert score is not None
    parts = []
    if before and after and score.kind == "text":
        change = after.change(before)
        value = after.change_text(before)
        paired = after.paired_stderr(before)
        value += "" if paired is None else f" ± {numbers.decimal(paired)}"
        parts = [
            f"nats per token, {before.value_text()} → {after.value_text()}",
            f"perplexity {perplexity_change(change)}",
        ]
    elif before and after:
        value = f"{before.value_text()} → {after.value_text()}"
        error = after.change_stderr(before)
        note = (
            "" if error is None else f" ± {numbers.decimal(error * (100 if score.unit == 'share' else 1), 1)}"
        )
        parts = [f"change {after.change_text(before)}{note}"]
    else:
        value = score.text()
        parts = ["after training only" if after else "before training only"]
    if score.n is not None:
        parts.append(f"{numbers.count(score.n)} items")
    if score.chance is not None:
        parts.append(f"chance {numbers.share(score.chance)}")
    return Card(_titled(score), value, parts)


def cost_cards(run: RunFolder) -> list[Card]:
    """Wall time, peak memory and trainable parameters, as far as `run.json` tells."""
    facts = run.run or {}
    result = []
    if _positive(facts.get("seconds")):
        parts = [f"{numbers.count(facts['steps'])} steps"] if _positive(facts.get("steps")) else []
        parts += [f"{numbers.count(facts['tokens'])} tokens"] if _positive(facts.get("tokens")) else []
        result.append(Card("Wall time", numbers.duration(facts["seconds"]), parts))
    if _positive(facts.get("peak_memory_bytes")):
        result.append(Card("Peak memory", numbers.memory(facts["peak_memory_bytes"]), ["busiest process"]))
    if _positive(facts.get("trainable_parameters")):
        result.append(
            Card(
                "Trainable parameters",
                numbers.count(facts["trainable_parameters"]),
                [METHOD_NAMES.get(run.method, run.method)],
            )
        )
    return result


def _positive(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )


def score_table(runs: Sequence[RunFolder]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of all scores: before, after and change of one run, or the runs side by side."""
    before = [all_scores(run.before) for run in runs]
    after = [all_scores(run.after) for run in runs]
    names = list(dict.fromkeys(name for column in before + after for name in column))
    if len(runs) == 1:
        headers = ["Score", "Before", "After", "Change", "Items", "Chance"]
    else:
        headers = ["Score", *(run.label for run in runs), "Items", "Chance"]
    rows = []
    for name in names:
        some = next(column[name] for column in before + after if name in column)
        unit = ", nats per token" if some.unit == "nats" else ""
        row = [f"{_titled(some)}{unit}"]
        for old, new in ((b.get(name), a.get(name)) for b, a in zip(before, after, strict=True)):
            row += _pair(old, new, apart=len(runs) == 1)
        row += [numbers.MISSING if some.n is None else numbers.count(some.n)]
        row += [numbers.MISSING if some.chance is None else numbers.share(some.chance)]
        rows.append(row)
    return headers, rows


def _pair(old: Score | None, new: Score | None, *, apart: bool) -> list[str]:
    if apart:
        change = new.change_text(old) if old and new else numbers.MISSING
        return [old.text() if old else numbers.MISSING, new.text() if new else numbers.MISSING, change]
    if old and new:
        return [f"{old.value_text()} → {new.text()}"]
    some = new or old
    return [numbers.MISSING if some is None else f"{some.text()} ({'after' if new else 'before'} only)"]


def merge_line(merge: Mapping[str, Any] | None) -> str | None:
    """How far the merged checkpoint is from the adapter model, in one sentence; None without a merge."""
    if merge is None:
        return None
    gap, kl = merge.get("max_logit_gap"), merge.get("kl")
    if not isinstance(gap, int | float):
        reason = merge.get("check_skipped") or "no check"
        return f"The merged model was not compared with the adapter model: {reason}."
    text = f"Adapter model and merged model differ by at most {numbers.compact(gap)} in any logit"
    text += f" (KL {numbers.compact(kl)} nats per token)." if isinstance(kl, int | float) else "."
    if not merge.get("trained_in_4_bits"):
        return text
    if merge.get("onto") == "original":
        return f"{text} The update is on the base's own weights; training saw them rounded to 4 bits."
    return f"{text} The update is on the 4-bit weights that training saw, dequantized."


def fact_rows(runs: Sequence[RunFolder]) -> list[list[str]]:
    """What the runs were and cost, one row per fact, one cell per run; facts that no run has are left out."""
    rows = [
        ["Method", *(_method_text(run) for run in runs)],
        ["Backbone", *(str(run.setting("backbone", "model", default=numbers.MISSING)) for run in runs)],
        [
            "Learning rate",
            *(str(run.setting("training", "learning_rate", default=numbers.MISSING)) for run in runs),
        ],
    ]
    titles = list(dict.fromkeys(card.title for run in runs for card in cost_cards(run)))
    for title in titles:
        found = [
            next((card.value for card in cost_cards(run) if card.title == title), numbers.MISSING)
            for run in runs
        ]
        rows.append([title, *found])
    steps = [run.run.get("steps") if run.run else None for run in runs]
    if any(_positive(step) for step in steps):
        rows.append(["Steps", *(numbers.count(s) if _positive(s) else numbers.MISSING for s in steps)])  # type: ignore[arg-type]
    return rows


def _method_text(run: RunFolder) -> str:
    adapter = run.setting("adapter", default={})
    if run.method not in ("secura", "cabr"):
        rank = adapter.get("rank", adapter.get("cur_rank"))
        return METHOD_NAMES.get(run.method, run.method) + (f", rank {rank}" if rank is not None else "")
    smagnorm = adapter.get("smagnorm") or {}
    parts = [
        METHOD_NAMES[run.method],
        f"{adapter['strategy']}" if adapter.get("strategy") else "",
        f"r {adapter['cur_rank']}, m {adapter['inner_rank']}"
        if {"cur_rank", "inner_rank"} <= set(adapter)
        else "",
        f"{adapter['selection']} factors" if adapter.get("selection") else "",
        f"S-MagNorm at {smagnorm['apply']}" if smagnorm.get("apply") in ("merge", "forward") else "",
    ]
    return ", ".join(part for part in parts if part)

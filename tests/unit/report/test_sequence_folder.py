"""Results folders of task sequences: read, joined into entries, and refused in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_continual import make_continual, make_frontier
from fake_run import make_run

from secura_ds.errors import UserError
from secura_ds.report import write_report
from secura_ds.report.norms import logged_norms
from secura_ds.report.sequence.entries import entries, lines
from secura_ds.report.sequence.folder import read_results
from secura_ds.report.sequence.gradients import gradient_table, read_gradients
from secura_ds.report.sequence.page import read_results_folders


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / "continual.json").read_text(encoding="utf-8"))
    change(document)
    (folder / "continual.json").write_text(json.dumps(document), encoding="utf-8")


def test_sequences_are_joined_over_seeds_and_orders(tmp_path: Path) -> None:
    home = read_results(make_continual(tmp_path / "r", tasks=3, entries=2, seeds=2, orders=2, runs=False))
    secura, lora = entries([home])
    assert (secura.label, lora.label, lora.index, len(secura.finished)) == ("secura", "lora", 1, 4)
    assert secura.orders == [("orders", "german", "units"), ("german", "units", "orders")]
    values = [metrics["plasticity"]["value"] for metrics in secura.metrics]
    errors = [metrics["plasticity"]["stderr"] for metrics in secura.metrics]
    summary = secura.summary("plasticity")
    assert summary is not None and summary.value == pytest.approx(np.mean(values))
    spread = np.std(values, ddof=1) / 2
    assert summary.stderr == pytest.approx(math.hypot(spread, np.mean(errors)))
    matrix = secura.matrix(secura.orders[1])
    first = [s for s in secura.sequences if tuple(s.order) == matrix.tasks]
    scores = [s.stages[2].tasks["german"].score for s in first]
    assert matrix.scores[3, 0] == pytest.approx(np.mean([s for s in scores if s is not None]) / 100)
    series = secura.probe_series("knowledge")
    assert len(series) == 4 and series[0] is not None and series[0].n == 1
    assert series[3] is not None and series[3].n == 4


def test_an_unfinished_sequence_counts_only_where_it_has_been(tmp_path: Path) -> None:
    home = read_results(make_continual(tmp_path / "r", entries=1, seeds=2, unfinished=1, runs=False))
    (entry,) = entries([home])
    summary = entry.summary("average_score")
    assert summary is not None and summary.n == 1 and len(entry.sequences) == 2
    series = entry.probe_series("knowledge")
    assert [point.n if point else 0 for point in series] == [1, 2, 2, 1]


def test_single_tasks_of_the_same_setting_are_references(tmp_path: Path) -> None:
    folder = make_continual(tmp_path / "r", tasks=2, entries=1, seeds=1, runs=False)

    def add(document: dict[str, Any]) -> None:
        sequence = document["sequences"][0]
        for place, task in enumerate(sequence["order"]):
            alone = json.loads(json.dumps(sequence))
            stage = {**alone["stages"][place], "task": task}
            maximum = document["tasks"][place]["maximum"]
            stage["tasks"][task]["score"] = 0.9 * maximum
            alone |= {"label": f"alone-{task}", "entry": f"alone-{task}", "order": [task], "stages": [stage]}
            document["sequences"].append(alone)

    edit(folder, add)
    whole, *alone = entries([read_results(folder)])
    matrix = whole.matrix(whole.orders[0])
    expected = np.mean([0.9 - matrix.scores[1, 0], 0.9 - matrix.scores[2, 1]])
    summary = whole.summary("intransigence")
    assert summary is not None and summary.value == pytest.approx(expected)
    assert all(entry.single and entry.summary("intransigence") is None for entry in alone)


def test_entries_of_one_method_make_a_line_by_rising_rate(tmp_path: Path) -> None:
    folder = make_frontier(tmp_path / "r", methods=2, rates=(1e-3, 1e-4))
    edit(folder, lambda d: d["sequences"][-1]["settings"].update(rank=16))
    found = lines(entries([read_results(folder)]))
    assert [line.label for line in found] == ["SECURA", "LoRA, rank 8", "LoRA, rank 16"]
    assert [entry.first.learning_rate for entry in found[0].entries] == [1e-4, 1e-3]


def test_lines_that_differ_in_much_have_the_recipes_names(tmp_path: Path) -> None:
    folder = make_frontier(tmp_path / "r", methods=2, rates=(1e-3, 1e-4))
    wide = {"rank": 16, "alpha": 8.0, "dropout": 0.1}
    edit(folder, lambda d: d["sequences"][-1].update(settings=wide, entry="lora-wide, 0.0001"))
    labels = [line.label for line in lines(entries([read_results(folder)]))]
    assert len(labels) == 3 and labels[0] == "SECURA" and labels[2] == "lora-wide"


def test_strategies_that_differ_in_a_setting_are_lines_of_their_own(tmp_path: Path) -> None:
    folder = make_frontier(tmp_path / "r", methods=2, rates=(1e-3, 1e-4))
    for place, penalty in ((-1, 10.0), (-2, 1000.0)):
        more = {"strategy": "ewc", "strategy_settings": {"kind": "ewc", "penalty": penalty}}
        edit(folder, lambda d, place=place, more=more: d["sequences"][place].update(more))
    labels = [line.label for line in lines(entries([read_results(folder)]))]
    assert labels[0] == "SECURA" and set(labels[1:]) == {
        "LoRA + EWC, penalty 10.0",
        "LoRA + EWC, penalty 1000.0",
    }


def test_gradients_run_on_from_stage_to_stage(tmp_path: Path) -> None:
    folder = make_continual(tmp_path / "r", tasks=2, entries=2, seeds=1)
    stage = folder / "sequences" / "secura-or-ge-seed0" / "stages" / "01-orders" / "metrics.jsonl"
    rows = [{"step": step, "grad_norm": norm} for step, norm in ((1, 1.0), (20, 3.0))]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 21, "grad_norm": NaN}\n{"ste'
    stage.write_text(text, encoding="utf-8")
    (stage.parents[1] / "02-german" / "metrics.jsonl").unlink()
    found, missing = read_gradients(entries([read_results(folder)]))
    assert missing == [str(stage.parents[1] / "02-german" / "metrics.jsonl")]
    assert found[0].sequences == [([1.0, 20.0], [1.0, 3.0])]
    assert found[1].sequences[0][0] == [float(step) for step in range(1, 41)]
    assert gradient_table(found)[1][0] == ["secura", "2", "1", "1", "1", "3", "2"]


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth else {}


BREAKS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda d: d.update(format=2), r"format is 2, this version reads format 1"),
    (lambda d: d.pop("tasks"), r"tasks: Field required"),
    (lambda d: d.update(sequences={}), r"sequences is \{\}: should be a valid list"),
    (lambda d: d["sequences"][1]["stages"][0].update(task="units"), r"stages are \['units', .*order is"),
    (lambda d: d["sequences"][0]["stages"].pop(), r"finished with 2 stages of 3"),
    (lambda d: d["sequences"][0].update(order=["orders", "orders"]), r"order names a task twice"),
    (lambda d: d["sequences"][0].update(folder="../../etc"), r"it must lie in the results folder"),
    (lambda d: d["sequences"][0].update(folder="/etc"), r"it must lie in the results folder"),
    (lambda d: [s.update(label="x") for s in d["sequences"]], r"sequences: x is there twice"),
    (lambda d: d["sequences"][0].update(settings=nested(12)), r"settings are nested too deeply"),
    (lambda d: d["sequences"][0].update(strategy_settings=nested(12)), r"strategy_settings are nested too"),
    (lambda d: d["before"]["tasks"]["orders"].update(score=1e300), r"less than or equal to"),
    (lambda d: d["tasks"].pop(0), r"trains orders, tasks are german, units"),
    (lambda d: d["before"]["tasks"]["orders"].update(score="1"), r'before\.tasks\.orders\.score is "1"'),
    (lambda d: d["before"]["tasks"]["orders"].update(score=float("nan")), r"should be a finite number"),
    (lambda d: d["before"]["tasks"]["orders"].update(stderr=-1), r"greater than or equal to 0"),
    (lambda d: d["tasks"][0].update(maximum=0), r"maximum is 0"),
    (lambda d: d["probes"][0].update(kind="poem"), r"should be 'multiple_choice' or 'text_loss'"),
    (lambda d: d.update(name="x" * 500), r"at most 200 characters"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), BREAKS)
def test_a_malformed_document_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    folder = make_continual(tmp_path / "r", entries=2, runs=False)
    edit(folder, change)
    with pytest.raises(UserError, match=words) as error:
        write_report([folder])
    message = str(error.value)
    assert (
        message.startswith(f"{folder}/continual.json: ")
        and ": : " not in message
        and "\n" not in message
        and len(message) < 600
    )
    assert not (folder / "report.html").exists() and not (folder / "plots").exists()


@pytest.mark.parametrize("text", ['{"format": 1, "na', "[]", "", "\x00", '{"format": 1}', "[" * 100_000])
def test_a_torn_document_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "continual.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"continual\.json") as error:
        write_report([tmp_path])
    assert "\n" not in str(error.value) and "launch/continual.py" in str(error.value)


def test_a_document_of_a_later_version_may_say_more(tmp_path: Path) -> None:
    folder = make_continual(tmp_path / "r", entries=1, runs=False)
    edit(folder, lambda d: d["sequences"][0]["stages"][0]["train"].update(joules=7))
    assert len(read_results(folder).results.sequences) == 2


def test_kinds_of_folders_are_not_mixed(tmp_path: Path) -> None:
    results = make_continual(tmp_path / "r", entries=1, runs=False)
    run = make_run(tmp_path / "run", steps=2, blocks=1)
    with pytest.raises(UserError, match=f"{results} holds the results of task sequences and {run} does not"):
        write_report([run, results])
    with pytest.raises(UserError, match="given twice"):
        read_results_folders([results, results / ".." / "r"])


def test_results_of_other_tasks_do_not_compare(tmp_path: Path) -> None:
    one = make_continual(tmp_path / "one", tasks=2, entries=1, runs=False)
    two = make_continual(tmp_path / "two", tasks=3, entries=1, runs=False)
    with pytest.raises(UserError, match=r"differ in their tasks \(units\): their scores do not compare"):
        read_results_folders([one, two])
    edit(one, lambda d: d.update(sequences=[]))
    with pytest.raises(UserError, match="there are no sequences yet"):
        write_report([one])


def test_entries_of_several_folders_get_names_of_their_own(tmp_path: Path) -> None:
    homes = read_results_folders(
        [make_continual(tmp_path / name, name=name, entries=n, seeds=1, runs=False) for name, n in
         (("first", 1), ("second", 2))]
    )  # fmt: skip
    assert [entry.label for entry in entries(homes)] == ["first: secura", "second: secura", "lora"]


def test_norms_of_tasks_learnt_alone_are_kept_apart(tmp_path: Path) -> None:
    folder = make_frontier(tmp_path / "r", methods=1, rates=(1e-4, 1e-3), tasks=2)
    norms = logged_norms([folder])
    assert list(norms) == [
        f"secura-{rate}, {task}" for task in ("orders", "german") for rate in ("0.0001", "0.001")
    ]
    assert all(norms.values())

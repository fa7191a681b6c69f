"""The page of task sequences: whole in itself, escaped, right for one entry and for twelve."""

from __future__ import annotations

import base64
import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_continual import make_continual, make_frontier
from matplotlib.figure import Figure

from secura_ds.report import write_report
from secura_ds.report.sequence.curves import sequence_curves
from secura_ds.report.sequence.entries import entries, parts
from secura_ds.report.sequence.folder import read_results
from secura_ds.report.sequence.frontier import _set_scale, frontier_plots
from secura_ds.report.sequence.heatmaps import heat_maps
from secura_ds.report.sequence.measures import INTRANSIGENCE, TASK_LOSS
from secura_ds.report.sequence.page import render_sequences


class Page(HTMLParser):
    """Tags with their attributes, and the visible text with single spaces."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).replace("\u00a0", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attrs.get(name) or "" for found, attrs in self.tags if found == tag]


def pngs(folder: Path) -> set[str]:
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())
    return {path.stem for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_continual(tmp_path_factory.mktemp("results") / "r", tasks=2, entries=2)
    assert write_report([folder]) == folder / "report.html"
    return folder


def test_the_page_needs_nothing_else(whole: Path) -> None:
    page = Page(whole / "report.html")
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "form"}
    images = page.attributes("img", "src") + page.attributes("source", "srcset")
    assert len(images) == 2 * len(pngs(whole / "plots")) and all(i.startswith("data:") for i in images)
    for uri in images:
        svg = base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,"))
        assert len(list(ElementTree.fromstring(svg).iter())) > 40
    assert all(len(alt) > 60 for alt in page.attributes("img", "alt"))
    anchors = page.attributes("a", "href")
    assert len(anchors) == 7 and {a[1:] for a in anchors} <= {attrs.get("id") for _, attrs in page.tags}


def test_every_plot_is_a_png_too(whole: Path) -> None:
    assert pngs(whole / "plots") == {
        "matrix-1", "matrix-2", "frontier-retention", "frontier-text-loss-change",
        "frontier-forgetting-diagonal", "tasks-so-far", "probe-1", "probe-2", "gradient-spread",
        "gradient-course",
    }  # fmt: skip


def test_the_same_results_give_the_same_page(whole: Path) -> None:
    assert render_sequences([read_results(whole)]) == (whole / "report.html").read_text(encoding="utf-8")


def test_tables_hold_the_numbers_of_the_document(whole: Path) -> None:
    text = Page(whole / "report.html").text
    document = json.loads((whole / "continual.json").read_text(encoding="utf-8"))
    last = [s["stages"][-1]["probes"]["general_text"]["score"] for s in document["sequences"][:2]]
    after = sum(last) / 2
    assert f"secura 3.160 ± 0.030 {after:.3f} ± 0.030 +{after - 3.16:.3f} ± 0.042" in text
    assert "SECURA 0.0003 737,280 40 122,880 1 min 06 s 1.20 GiB none" in text
    assert "Nothing: every sequence is finished and everything was measured." in text


def test_names_are_escaped(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>\"' $x_1$"
    folder = make_continual(tmp_path / "r", tasks=2, entries=2, seeds=1, name=attack, runs=False)
    file = folder / "continual.json"
    text = file.read_text(encoding="utf-8")
    for name in ('"lora"', '"units"', '"german"', '"knowledge"', '"dora"', '"exact_match"'):
        text = text.replace(name, json.dumps(f"{name[1:-1]} {attack}"))
    file.write_text(text, encoding="utf-8")
    page = Page(write_report([folder]))
    assert "script" not in {tag for tag, _ in page.tags}
    for name in ("lora", "german", "exact match", "knowledge"):
        assert f"{name} {attack}".lower().replace("_", " ") in page.text.lower().replace("_", " ")
    assert "No gradient norms are in" in page.text and "gradient-course" not in pngs(folder / "plots")


def test_a_sweep_of_rates_is_a_frontier(tmp_path: Path) -> None:
    folder = make_frontier(tmp_path / "r", seeds=2)
    text = Page(write_report([folder])).text
    assert {"rates-retention", "rates-text-loss-change"} <= pngs(folder / "plots")
    assert not any(name.startswith(("matrix", "probe")) for name in pngs(folder / "plots"))
    assert "which 3 methods reach between their rates, SECURA has the best knowledge kept" in text
    assert "Backward transfer" not in text


def test_a_method_of_one_rate_is_named_like_those_of_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_frontier(tmp_path / "r", methods=2, rates=(1e-3, 1e-4))
    document = json.loads((folder / "continual.json").read_text(encoding="utf-8"))
    del document["sequences"][-1]
    (folder / "continual.json").write_text(json.dumps(document), encoding="utf-8")
    named: set[str] = set()
    monkeypatch.setattr(
        "secura_ds.report.sequence.frontier.legend_above",
        lambda figure, axes: named.update(axes.get_legend_handles_labels()[1]),
    )
    frontier_plots(entries([read_results(folder)]), None)
    assert named == {"SECURA", "LoRA"}


def test_tasks_learnt_alone_have_a_part_of_the_page_each(tmp_path: Path) -> None:
    """Averaged over tasks, an entry's error bar would be the tasks' difference."""
    folder = make_frontier(tmp_path / "r", tasks=2, seeds=2)
    document = json.loads((folder / "continual.json").read_text(encoding="utf-8"))
    for sequence in document["sequences"]:
        if sequence["order"] == ["german"]:
            sequence["stages"][0]["tasks"]["german"]["loss"] += 5
    (folder / "continual.json").write_text(json.dumps(document), encoding="utf-8")
    page = Page(write_report([folder]))
    assert sorted(path.name for path in (folder / "plots").iterdir()) == ["tasks-1", "tasks-2"]
    for part in ("tasks-1", "tasks-2"):
        assert {"rates-retention", "rates-text-loss-change"} <= pngs(folder / "plots" / part)
    anchors = page.attributes("a", "href")
    assert anchors == ["#verdict-1", "#verdict-2", "#missing"]
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids)) and {a[1:] for a in anchors} <= set(ids)
    assert "Entries: orders" in page.text and "Entries: german" in page.text
    assert page.text.count("which 3 methods reach between their rates") == 4
    found = entries([read_results(folder)])
    assert [part.title for part in parts(found)] == ["orders", "german"]
    orders, german = (TASK_LOSS.of(part.entries[0]) for part in parts(found))
    assert orders is not None and german is not None and german.value > orders.value + 4
    assert (german.stderr or 9) < 0.2
    first, second = ({e.label: e.index for e in part.entries} for part in parts(found))
    assert first == second and sorted(first.values()) == list(range(9))


def test_a_task_learnt_alone_still_tells_what_the_sequence_kept_from_being_learnt(tmp_path: Path) -> None:
    folder = make_continual(tmp_path / "r", tasks=2, entries=1, seeds=1, runs=False)
    document = json.loads((folder / "continual.json").read_text(encoding="utf-8"))
    whole = document["sequences"][0]
    for number, name in enumerate(whole["order"]):
        alone = {**whole, "label": f"alone-{name}", "order": [name], "stages": [whole["stages"][number]]}
        document["sequences"].append(json.loads(json.dumps(alone)))
    (folder / "continual.json").write_text(json.dumps(document), encoding="utf-8")
    together = parts(entries([read_results(folder)]))[0].entries[0]
    found = INTRANSIGENCE.of(together)
    assert found is not None and found.value == pytest.approx(0)
    assert "2 tasks" not in Page(write_report([folder])).text


@pytest.mark.parametrize(("tasks", "entries", "orders"), [(1, 1, 1), (16, 12, 1), (5, 2, 3)])
def test_small_and_large_studies_are_drawn(tmp_path: Path, tasks: int, entries: int, orders: int) -> None:
    folder = make_continual(tmp_path / "r", tasks=tasks, entries=entries, seeds=1, orders=orders, runs=False)
    page = Page(write_report([folder]))
    maps = [name for name in pngs(folder / "plots") if name.startswith("matrix")]
    assert len(maps) == (0 if tasks == 1 else entries * orders)
    assert ("4 more orders" in page.text) == (orders == 3)
    assert "Take it as a lead, not a result" in page.text or orders == 3


def test_what_has_exploded_does_not_set_the_scale(tmp_path: Path) -> None:
    folder = make_frontier(tmp_path / "r", methods=2, rates=(1e-3, 1e-4))
    document = json.loads((folder / "continual.json").read_text(encoding="utf-8"))
    exploded = document["sequences"][-1]
    for fields in exploded["stages"][0]["tasks"].values():
        fields["loss"] = 30.0
    (folder / "continual.json").write_text(json.dumps(document), encoding="utf-8")
    (plot,) = [
        plot
        for part in parts(entries([read_results(folder)]))
        for plot in frontier_plots(part.entries, None)
        if plot.name == "rates-text-loss-change"
    ]
    assert (
        f"they have learnt nothing: {exploded['entry']}." in plot.note and exploded["entry"] not in plot.alt
    )
    other = document["sequences"][0]["entry"]
    assert other in plot.alt and other not in plot.note


def test_what_has_not_begun_is_in_no_plot(tmp_path: Path) -> None:
    folder = make_continual(tmp_path / "r", tasks=2, entries=2, seeds=1, runs=False)
    document = json.loads((folder / "continual.json").read_text(encoding="utf-8"))
    begun, waiting = document["sequences"]
    waiting |= {"stages": [], "status": "unfinished", "metrics": None}
    (folder / "continual.json").write_text(json.dumps(document), encoding="utf-8")
    found = entries([read_results(folder)])
    assert [entry.begun() for entry in found] == [True, False]
    assert len(heat_maps(found, None)) == 1
    assert not any(found[1].label in plot.alt for plot in sequence_curves(found, None))
    assert all(found[0].label in plot.alt for plot in sequence_curves(found, None))


def test_unfinished_and_unmeasured_parts_are_named(tmp_path: Path) -> None:
    folder = make_continual(tmp_path / "r", tasks=2, entries=1, seeds=1, unfinished=1, runs=False)
    document = json.loads((folder / "continual.json").read_text(encoding="utf-8"))
    for place in [document["before"], *document["sequences"][0]["stages"]]:
        del place["probes"]["knowledge"]
        for fields in place["tasks"].values():
            fields["score"] = fields["stderr"] = None
    (folder / "continual.json").write_text(json.dumps(document), encoding="utf-8")
    text = Page(write_report([folder])).text
    assert "No sequence is finished yet: nothing can be said." in text
    assert "secura-or-ge-seed0 is unfinished (1 of 2 tasks): its metrics are not counted." in text
    assert "these tasks: orders, german." in text and "these probes: knowledge." in text
    assert "matrix-1" in pngs(folder / "plots")


def test_a_diverged_sequence_is_named(tmp_path: Path) -> None:
    folder = make_continual(tmp_path / "r", tasks=2, entries=2, seeds=1, unfinished=1, runs=False)
    document = json.loads((folder / "continual.json").read_text(encoding="utf-8"))
    ended = next(s for s in document["sequences"] if s["status"] == "unfinished")
    ended["status"] = "diverged"
    (folder / "continual.json").write_text(json.dumps(document), encoding="utf-8")
    text = Page(write_report([folder])).text
    assert f"{ended['label']} has diverged (1 of 2 tasks): its metrics are not counted." in text


def test_losses_stand_in_for_scores_that_nobody_asked_for(tmp_path: Path) -> None:
    folder = make_continual(tmp_path / "r", tasks=2, entries=2, seeds=2, runs=False)
    document = json.loads((folder / "continual.json").read_text(encoding="utf-8"))
    points: list[dict[str, Any]] = [document["before"]]
    points += [stage for sequence in document["sequences"] for stage in sequence["stages"]]
    for point in points:
        for fields in point["tasks"].values():
            fields["score"] = fields["stderr"] = None
    (folder / "continual.json").write_text(json.dumps(document), encoding="utf-8")
    page = Page(write_report([folder]))
    assert "lora learnt most: task loss, change right after training −" in page.text
    assert "Each task before training" not in page.text
    assert "secura forgot least of its own tasks: task loss, rise since learnt +" in page.text
    assert "Rise since learnt, nats" in page.text and "Score at the end" not in page.text
    assert "frontier-task-loss-forgotten" in pngs(folder / "plots")
    assert any("Heat map of secura" in alt and "orders: 2.600 before" in alt
               for alt in page.attributes("img", "alt"))  # fmt: skip


def test_several_folders_are_compared_on_one_page(tmp_path: Path) -> None:
    folders = [
        make_continual(tmp_path / name, name=name, tasks=2, entries=1, seeds=2, runs=False)
        for name in ("first", "second")
    ]
    text = Page(write_report(folders, tmp_path / "both.html")).text
    assert "first against second" in text and "comparison of 2 results" in text
    assert "first: secura" in text and "second: secura" in text
    assert "frontier-retention" in pngs(tmp_path / "both-plots") and not (folders[0] / "plots").exists()


@pytest.mark.parametrize(
    ("losses", "scale"), [([0.02, 1.1], "log"), ([2.8, 3.4], "linear"), ([0.0, 1.0], "linear")]
)
def test_losses_that_are_far_apart_share_a_logarithmic_axis(losses: list[float], scale: str) -> None:
    axes = Figure().subplots()
    _set_scale(axes, TASK_LOSS, losses)
    assert axes.get_xscale() == scale

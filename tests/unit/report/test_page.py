"""The page: whole in itself, escaped, readable with half of its sources missing."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fake_run import make_run

from secura_ds.errors import UserError
from secura_ds.report import write_report
from secura_ds.report.curves import moving_mean
from secura_ds.report.data import data_tables
from secura_ds.report.drawing import DARK, LIGHT, darkened
from secura_ds.report.layers import split_name
from secura_ds.report.missing import missing_notes
from secura_ds.report.page import recipe_differences, render_page
from secura_ds.report.run_folder import read_run, read_runs

PLOTS = {
    "scores",
    "text-loss",
    "loss",
    "learning-rate",
    "grad-norm",
    "tokens-per-second",
    "memory-bytes",
    "relative-change",
    "limiter-mean",
    "ratio-max",
}


class Page(HTMLParser):
    """Collects tags with their attributes and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attrs.get(name) or "" for found, attrs in self.tags if found == tag]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = make_run(tmp_path_factory.mktemp("runs") / "run", steps=8, blocks=4)
    page = write_report([folder])
    assert page == folder / "report.html"
    return folder, page.read_text(encoding="utf-8")


def test_the_page_needs_nothing_else(whole: tuple[Path, str]) -> None:
    page = Page(whole[1])
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "form"}
    sources = (
        page.attributes("img", "src") + page.attributes("source", "srcset") + page.attributes("link", "href")
    )
    assert len(sources) == 2 * len(PLOTS) + 1 and all(source.startswith("data:") for source in sources)
    assert all(href.startswith("#") for href in page.attributes("a", "href"))
    style = whole[1].split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style and "{%" not in style and "--series-5: #" in style
    anchors = {href[1:] for href in page.attributes("a", "href")}
    assert anchors <= {attrs.get("id") for _, attrs in page.tags}


def test_what_was_read_is_told_once_for_runs_that_read_the_same(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, name=name, steps=8, blocks=2) for name in ("one", "two", "three")]
    document = json.loads((folders[2] / "data.json").read_text())
    document["sources"][0] |= {"read": 7, "used": 7, "cut": 0, "unused": []}
    (folders[2] / "data.json").write_text(json.dumps(document))
    same, other = data_tables(read_runs(folders))
    assert (same.runs, other.runs) == (["one", "two"], ["three"])
    assert same.headers == ["Source", "Read", "Used", "Cut to max_length", "Fields not used"]
    assert same.rows == [["orders.jsonl", "1,800", "1,800", "3", "id"]]
    assert other.headers == ["Source", "Read", "Used"]
    assert other.rows == [["orders.jsonl", "7", "7"]]
    told = "1,800 training examples, 450 rows, 149,604 tokens, 52,672 of these learnt"
    page = render_page(read_runs(folders))
    assert f"one, two: {told}." in page and f"three: {told}." in page
    assert f"<p>{told}." in render_page(read_runs(folders[:2]))
    for folder in folders:
        (folder / "data.json").unlink()
    assert data_tables(read_runs(folders)) == []


def test_plots_are_sound_images_with_words(whole: tuple[Path, str]) -> None:
    folder, html = whole
    page = Page(html)
    assert all(len(alt) > 60 for alt in page.attributes("img", "alt"))
    assert any("JSON exact match: before 1.2 % ± 0.9, after 91.2 % ± 2.2" in " ".join(alt.split())
               for alt in page.attributes("img", "alt"))  # fmt: skip
    for uri in page.attributes("img", "src") + page.attributes("source", "srcset"):
        svg = base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,"))
        root = ElementTree.fromstring(svg)
        assert root.tag.endswith("svg") and len(list(root.iter())) > 50
    assert {path.stem for path in (folder / "plots").glob("*.png")} == PLOTS
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (folder / "plots").iterdir())


def test_the_same_run_gives_the_same_page(whole: tuple[Path, str]) -> None:
    assert render_page([read_run(whole[0])]) == whole[1]


def test_what_the_page_says(whole: tuple[Path, str]) -> None:
    text = " ".join(Page(whole[1]).text.replace("\u00a0", " ").split())
    for words in (
        "JSON exact match on the task went from 1.2 % to 91.2 %.",
        "Wall time 4 min 12 s",
        "Facts by topic Topic Before After Items capitals 95.7 % 94.0 % 60",
        "differ by at most 0.00021 in any logit",
        "All 12 recorded items of the task",
        "git commit 79b1d05c0ffee",
        '"cur_rank": 64',
    ):
        assert words in text
    assert "is missing" not in text and "did not finish" not in text


def test_data_is_escaped(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>"
    folder = make_run(tmp_path / "run", name=f"{attack} $x_1$", steps=3, blocks=1)
    document = json.loads((folder / "evaluation.after.json").read_text(encoding="utf-8"))
    document["task"]["examples"][0]["answer"] = f"{attack}\"' \ud800"
    document["probes"][attack] = {"kind": "multiple_choice", "score": 0.5, "stderr": 0.1, "n": 9}
    (folder / "evaluation.after.json").write_text(json.dumps(document), encoding="utf-8")
    html = write_report([folder]).read_text(encoding="utf-8")
    assert "script" not in {tag for tag, _ in Page(html).tags}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39; ?" in html
    assert Page(html).text.count(attack) >= 4


def test_missing_files_are_named_with_their_command(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step"', encoding="utf-8")
    text = " ".join(Page(write_report([tmp_path]).read_text(encoding="utf-8")).text.split())
    for file, command in (
        ("evaluation.before.json", "python launch/evaluate.py RECIPE --out"),
        ("evaluation.after.json", f"python launch/evaluate.py RECIPE --adapter {tmp_path}/adapter --out"),
        ("merge.json", f"python launch/merge.py --base DIR --adapter {tmp_path}/adapter --out DIR"),
        ("recipe.resolved.json", "deepspeed launch/train.py RECIPE"),
        ("environment.json", "deepspeed launch/train.py RECIPE"),
    ):
        assert f"{file} is missing. It is written by {command}" in text
    assert "Unreadable lines were left out" in text and "the run has not ended, or it was killed" in text


def test_each_missing_file_is_noted_in_its_section(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=3, blocks=1)
    assert not any(missing_notes([read_run(folder)]).values())
    for path in [
        folder / name for name in ("statistics.jsonl", "evaluation.before.json", "environment.json")
    ]:
        path.unlink()
    notes = missing_notes([read_run(folder)])
    named = {section: [note.file for note in found] for section, found in notes.items() if found}
    assert named == {
        "layers": ["statistics.jsonl"],
        "scores": ["evaluation.before.json"],
        "environment": ["environment.json"],
    }
    text = " ".join(Page(render_page([read_run(folder)])).text.split())
    assert "after training only" in text and text.count("is missing. It is written by") == 3


def test_a_comparison_of_two_runs(tmp_path: Path) -> None:
    secura = make_run(tmp_path / "secura", steps=64, blocks=2)
    lora = make_run(tmp_path / "lora", method="lora", name="lora", steps=64, blocks=2)
    page = write_report([secura, lora], tmp_path / "both.html")
    html = page.read_text(encoding="utf-8")
    text = " ".join(Page(html).text.replace("\u00a0", " ").split())
    assert "smollm2-135m against lora" in text and "SECURA comparison of 2 runs" in text
    assert "Facts 91.7 % → 90.0 % ± 2.7 91.7 % → 73.3 % ± 4.0 120 25.0 %" in text
    assert "statistics.jsonl is missing" not in text
    assert "run1-ratio-max" in {path.stem for path in (tmp_path / "both-plots").iterdir()}
    assert not (secura / "plots").exists()
    differences = {row[0]: row[1:] for row in recipe_differences(read_runs([secura, lora]))}
    assert differences["adapter.method"] == ['"secura"', '"lora"']
    assert differences["training.learning_rate"] == ["0.001", "0.0005"]
    assert differences["adapter.rank"] == ["–", "8"] and "backbone.model" not in differences


def test_a_page_cannot_replace_a_folder(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=2, blocks=1)
    with pytest.raises(UserError, match="is a folder: give --out the path of an HTML file"):
        write_report([folder], tmp_path)


def test_a_dark_plot_has_each_colour_exchanged() -> None:
    svg = f"fill: {LIGHT.series[0]}; stroke: {LIGHT.ink}; stop: #123456; {LIGHT.paper}"
    assert darkened(svg) == f"fill: {DARK.series[0]}; stroke: {DARK.ink}; stop: #123456; {DARK.paper}"


def test_the_moving_mean_keeps_length_and_level() -> None:
    values = [0.0, 3.0, 6.0, 9.0, 12.0]
    assert moving_mean(values, 3).tolist() == [1.5, 3.0, 6.0, 9.0, 10.5]
    assert np.array_equal(moving_mean(values, 1), values) and np.array_equal(moving_mean(values, 0), values)


def test_layer_names_are_taken_apart() -> None:
    assert split_name("base_model.model.model.layers.13.self_attn.q_proj") == ("q_proj", 13)
    assert split_name("lm_head") == ("lm_head", None)


def test_sizes_are_moderate(whole: tuple[Path, str]) -> None:
    assert len(whole[1]) < 2_000_000
    assert re.search(r"<title>[^<]+</title>", whole[1])

"""Spoiled recipes: each is a recipe still, or one report of what is wrong with it; nothing else happens."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mutations import ODD_VALUES, as_json, spoiled_bytes, spoiled_values
from training_toys import REPOSITORY

from secura_ds.errors import UserError, printable
from secura_ds.recipe import load_recipe
from secura_ds.training import folder as folders
from secura_ds.training import preflight

SHIPPED = REPOSITORY / "recipes"
PATHS = sorted({*SHIPPED.glob("*.json"), *SHIPPED.glob("qlora/*.json")} - {SHIPPED / "recipe.schema.json"})
# Where a recipe lies matters, as its paths are relative: its folder below recipes/, and its text.
TEXTS = [(path.parent.relative_to(SHIPPED), path.read_bytes()) for path in PATHS]
DOCUMENTS = [(place, json.loads(text)) for place, text in TEXTS]
EXAMPLES = 700  # of each of three kinds
LONGEST = 5.0  # seconds
COUNTED: Counter[str] = Counter()

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the spoiled recipes lie, beside what the shipped ones name."""
    found = tmp_path_factory.mktemp("recipes")
    for name in ("tasks", "probes", "deepspeed"):
        (found / name).symlink_to(SHIPPED / name)
    (found / "qlora").mkdir()
    return found


@pytest.fixture(scope="module", autouse=True)
def _under_a_launcher() -> Iterator[None]:
    """So that DeepSpeed's settings are checked, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "1")
        yield


def check(folder: Path, place: Path, kind: str, text: bytes, overrides: list[str]) -> None:
    """Load one recipe, and go on as far as a run does before it loads anything."""
    path = folder / place / "recipe.json"
    path.write_bytes(text)
    before, began = sorted(folder.rglob("*")), time.monotonic()
    try:
        recipe = load_recipe(path, overrides)
        json.dumps(recipe.resolved())
        preflight.check_machine(recipe)
        preflight.deepspeed_settings(recipe)
        folders.check(Path(recipe.training.output_dir).absolute(), resume=False, overwrite=False)
        COUNTED[f"{kind}, accepted"] += 1
    except UserError as error:
        said = printable(str(error))
        assert 0 < len(said) < 20_000 and all(line.isprintable() and line for line in said.split("\n"))
        COUNTED[f"{kind}, refused"] += 1
    assert time.monotonic() - began < LONGEST
    assert sorted(folder.rglob("*")) == before
    path.unlink()


@fuzz
@given(data=st.data())
def test_spoiled_text(folder: Path, data: st.DataObject) -> None:
    place, text = data.draw(st.sampled_from(TEXTS))
    check(folder, place, "text", data.draw(spoiled_bytes(text)), [])


@fuzz
@given(data=st.data())
def test_spoiled_values(folder: Path, data: st.DataObject) -> None:
    place, document = data.draw(st.sampled_from(DOCUMENTS))
    check(folder, place, "values", as_json(data.draw(spoiled_values(document))), [])


def settings_in(document: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of a recipe as --set names it, and its value as JSON."""
    for key, value in document.items() if isinstance(document, dict) else ():
        yield f"{prefix}{key}", json.dumps(value)
        yield from settings_in(value, f"{prefix}{key}.")


SETTINGS = sorted({setting for _, document in DOCUMENTS for setting in settings_in(document)})
ODD = st.one_of(
    st.sampled_from([json.dumps(value) for value in ODD_VALUES]),
    st.sampled_from([value for _, value in SETTINGS]),
    st.text(max_size=20),
    st.sampled_from(["[", "{", '"', "1e999", "[" * 3000, "tru", "'x'", '{"a":1,"a":2}']),
)
OVERRIDE = st.one_of(
    st.sampled_from(SETTINGS).map("=".join),
    st.builds(lambda setting, odd: f"{setting[0]}={odd}", st.sampled_from(SETTINGS), ODD),
    st.builds(
        lambda key, more, equals, odd: f"{key}{more}{equals}{odd}",
        st.one_of(st.sampled_from([key for key, _ in SETTINGS]), st.text(max_size=12)),
        st.sampled_from([".x", ".0", ".-1", ".999999999999", "..", "."]),
        st.sampled_from(["=", "", "==", " = "]),
        ODD,
    ),
)


@fuzz
@example(text=TEXTS[0], overrides=["a" + ".b" * 3000 + "=1"])
@example(text=TEXTS[0], overrides=["training.output_dir=" + "x" * 5000])
@given(text=st.sampled_from(TEXTS), overrides=st.lists(OVERRIDE, min_size=1, max_size=2))
def test_spoiled_overrides(folder: Path, text: tuple[Path, bytes], overrides: list[str]) -> None:
    check(folder, text[0], "overrides", text[1], overrides)


def test_enough_was_tried() -> None:
    assert COUNTED.total() >= 2000
    for kind in ("text", "values", "overrides"):
        assert COUNTED[f"{kind}, refused"] > EXAMPLES / 3, COUNTED
        assert COUNTED[f"{kind}, accepted"] > EXAMPLES / 20, COUNTED

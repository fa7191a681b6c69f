"""Thousands of broken recipes: each loads, or is refused in one report that names it, and nothing is left."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fuzz_toys import as_json, broken_bytes, broken_value, fuzz, listing, values, well_or_refused
from hypothesis import strategies as st
from training_toys import toy_recipe, write_toy

from secura_ds.backbones import load_config, shipped_config
from secura_ds.backbones.adapter import adapter_config
from secura_ds.errors import UserError
from secura_ds.plan import plan
from secura_ds.recipe import BackboneRecipe, Recipe, load_recipe
from secura_ds.training import preflight
from secura_ds.training.arguments import make_arguments

pytestmark = pytest.mark.long

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(
    str(path.relative_to(RECIPES))
    for path in [*RECIPES.glob("*.json"), *RECIPES.glob("qlora/*.json")]
    if not path.name.endswith(".schema.json")
)
SECONDS = 5.0  # in which a recipe is loaded or refused
PLANNED = 4  # every so manieth valid recipe is planned, too

ran: Counter[str] = Counter()
valid: Counter[str] = Counter()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped recipes' folder, and a toy backbone beside it."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(RECIPES, folder, dirs_exist_ok=True)
    write_toy(folder / "toy")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _counted() -> Iterator[None]:
    yield
    print(f"\nrecipes tried: {dict(ran)}, of them valid: {dict(valid)}")


def _try(folder: Path, kind: str, name: str, text: bytes, options: Sequence[str] = ()) -> Recipe | None:
    """Load a broken form of the recipe `name`, written beside it, and go on with what is valid."""
    ran[kind] += 1
    path = (folder / name).with_name("fuzzed.json")
    path.write_bytes(text)
    before, began = listing(folder), time.monotonic()
    recipe = well_or_refused(lambda: load_recipe(path, options), "" if options else "fuzzed.json")
    assert time.monotonic() - began < SECONDS
    if recipe is not None:
        valid[kind] += 1
        _go_on(recipe, folder, planned=valid[kind] % PLANNED == 0)
    assert listing(folder) == before
    path.unlink()
    return recipe


def _go_on(recipe: Recipe, folder: Path, *, planned: bool) -> None:
    """As far as training goes before anything is loaded; what is written down must load again."""
    text = json.dumps(recipe.resolved(), ensure_ascii=False, allow_nan=False).encode()
    assert Recipe.model_validate(json.loads(text), context={"folder": folder}).resolved() == recipe.resolved()
    toy = load_config(BackboneRecipe(model=str(folder / "toy" / "backbone")))
    config = shipped_config(recipe.backbone.model) or toy
    well_or_refused(lambda: preflight.check_machine(recipe))
    well_or_refused(lambda: adapter_config(recipe, config))
    well_or_refused(lambda: make_arguments(recipe, folder / "run", None))
    with pytest.MonkeyPatch.context() as launched:
        launched.setenv("RANK", "0")
        launched.setenv("WORLD_SIZE", "1")
        well_or_refused(lambda: preflight.deepspeed_settings(recipe))
    if planned:
        ran["planned"] += 1
        well_or_refused(lambda: plan(recipe, toy))


names = st.sampled_from(SHIPPED)


@st.composite
def texts(draw: st.DrawFn) -> tuple[str, bytes]:
    """A shipped recipe's name, and a broken form of its text."""
    name = draw(names)
    return name, draw(broken_bytes((RECIPES / name).read_bytes()))


@st.composite
def objects(draw: st.DrawFn) -> tuple[str, Any]:
    """A shipped recipe's name, and a broken form of its values."""
    name = draw(names)
    return name, draw(broken_value(json.loads((RECIPES / name).read_bytes())))


def _keys(value: Any, prefix: str = "") -> Iterator[str]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield f"{prefix}{key}"
        yield from _keys(value[key], f"{prefix}{key}.")


KEYS = sorted({key for name in SHIPPED for key in _keys(json.loads((RECIPES / name).read_bytes()))})


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    """Options as they come after `--set`: a known or an odd key, and JSON or anything else."""
    keys = (
        st.sampled_from(KEYS) | st.text(max_size=12) | st.sampled_from(["a" + ".b" * 3000, "data.sources.²"])
    )
    numbers = st.sampled_from([1, 2, 0.5, 1e-3, 2**31 - 1])
    given = (values | numbers).map(lambda value: as_json(value).decode()) | st.text(max_size=20)
    return [f"{draw(keys)}={draw(given)}" for _ in range(draw(st.integers(1, 3)))]


def test_broken_text(folder: Path) -> None:
    fuzz(900, texts(), lambda broken: _try(folder, "text", *broken))
    assert valid["text"] >= 10


def test_broken_structure(folder: Path) -> None:
    fuzz(1500, objects(), lambda broken: _try(folder, "structure", broken[0], as_json(broken[1])))
    assert valid["structure"] >= 100


def test_broken_overrides(folder: Path) -> None:
    def check(broken: tuple[str, list[str]]) -> None:
        _try(folder, "override", broken[0], (RECIPES / broken[0]).read_bytes(), broken[1])

    fuzz(900, st.tuples(names, overrides()), check)
    assert valid["override"] >= 5


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("data.seed=4294967296", ["data.seed", "less than 4294967296"]),
        ("training.max_steps=2147483648", ["training.max_steps", "less than 2147483648"]),
        ("data.sources.0.path=a\x00b", ["data.sources.0.path", "no such file"]),
        ("data.sources.0.path=" + "x" * 5000, ["data.sources.0.path", "no such file"]),
        ("data.sources.0.path=~nobody-at-all/x", ["data.sources.0.path", "no such file"]),
        ("backbone.model=a\x00b", ["backbone.model", "existing folder"]),
        ("backbone.revision=../../x", ["backbone.revision", "a branch, a tag or a commit"]),
        ("training.output_dir=a\x00b", ["training.output_dir", "a folder on this machine"]),
        ("training.output_dir=" + "x" * 300, ["training.output_dir", "255 bytes"]),
        ("training.output_dir=s3://bucket/x", ["training.output_dir", "a folder on this machine"]),
        ('data.sources=[{"hub": "https://host/x"}]', ["data.sources.0.hub", "a hub id"]),
        ('adapter.rank_pattern={"(": 4}', ["adapter.rank_pattern", "no regular expression"]),
        ('adapter={"method": "lora", "rank": 1, "rank": 2}', ["--set", "given twice"]),
        ("data.sources.²=1", ["--set data.sources.²", "1 entries"]),
        ("training.learning_rate=" + "[" * 100_000, ["--set", "nested too deeply"]),
        ("training.learning_rate=" + "1" * 5000, ["--set", "too long"]),
        ('description="\\ud800"', ["--set", "lone surrogate"]),
        ('description={"' + "k" * 5000 + '": 1}', ["description", "valid string"]),
        ("a\x1b[31m\nb=1", ["is no known key"]),
    ],
)
def test_known_bad_values(folder: Path, option: str, words: list[str]) -> None:
    text = json.dumps(toy_recipe() | {"backbone": {"model": "toy/backbone"}})
    (folder / "rows.jsonl").touch()
    with pytest.raises(UserError) as caught:
        _load(folder / "known.json", text.encode(), option)
    report = str(caught.value)
    assert report.isprintable() and len(report) < 500 and all(word in report for word in words), report


def _load(path: Path, text: bytes, *options: str) -> Recipe:
    path.write_bytes(text)
    return load_recipe(path, options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"name": ' + b"1" * 5000 + b"}", "too long"),
        (b'{"name": "\\ud800"}', "lone surrogate"),
        (b'{"' + b"k" * 5000 + b'": 1, "' + b"k" * 5000 + b'": 2}', "given twice"),
    ],
)
def test_known_bad_files(folder: Path, text: bytes, words: str) -> None:
    with pytest.raises(UserError, match=rf"known\.json.*{words}") as caught:
        _load(folder / "known.json", text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_a_byte_order_mark_is_no_mistake(folder: Path) -> None:
    text = (RECIPES / "smollm2-135m.json").read_bytes()
    (folder / "marked.json").write_bytes(b"\xef\xbb\xbf" + text)
    assert load_recipe(folder / "marked.json") == load_recipe(folder / "smollm2-135m.json")


def test_the_output_folder_may_lie_in_the_home_folder(folder: Path) -> None:
    loaded = load_recipe(folder / "smollm2-135m.json", ["training.output_dir=~/runs/x"])
    assert loaded.training.output_dir == str(Path.home() / "runs" / "x")


@pytest.mark.parametrize("name", ["x" * 5000 + ".json", "a\x00b.json", "~nobody-at-all/x.json", ""])
def test_a_name_that_no_recipe_can_have(name: str) -> None:
    with pytest.raises(UserError, match="no such file; recipes are JSON files"):
        load_recipe(name)

"""From a recipe's file and `--set` overrides to a checked `Recipe`, or to everything wrong with it."""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from secura_ds.errors import UserError, shown
from secura_ds.reading import NotJson, parse_json, read_json_object
from secura_ds.recipe.adapter import METHODS, CabrSettings, Calibration, SecuraAdapter, SMagNorm
from secura_ds.recipe.base import RULE
from secura_ds.recipe.schema import Recipe

logger = logging.getLogger(__name__)

Location = tuple[int | str, ...]
TAGS = METHODS  # pydantic puts the adapter's method into the location of an error


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: the recipe's JSON file; paths inside are relative to its folder, else to the current folder.
        overrides: `a.b=c` each; c is JSON, else a bare string. Lists have indices: `data.sources.0.path=x`.

    Raises:
        UserError: all problems, one a line: where, what was given, what is allowed, and the file.
    """
    path = Path(path)
    values = _read(path)
    problems = [problem for text in overrides if (problem := _override(values, text))]
    changed = [text.partition("=")[0].strip() for text in overrides]
    recipe = None
    try:
        recipe = Recipe.model_validate(values, context={"folder": path.resolve().parent})
    except ValidationError as error:
        problems += [_explain(details, changed) for details in error.errors(include_url=False)]
    if recipe is None or problems:
        raise UserError("\n".join(f"{problem} ({path})" for problem in problems))
    recipe._folder = path.resolve().parent
    for warning in _without_effect(recipe):
        logger.warning("%s (%s)", warning, path)
    return recipe


def changed(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with `a.b=c` overrides as `load_recipe` takes them.

    Raises:
        UserError: all problems, one a line.
    """
    values = recipe.resolved()
    problems = [problem for text in overrides if (problem := _override(values, text))]
    try:
        result = Recipe.model_validate(values, context={"folder": recipe.folder})
    except ValidationError as error:
        names = [text.partition("=")[0].strip() for text in overrides]
        problems += [_explain(details, names) for details in error.errors(include_url=False)]
    if problems:
        raise UserError("\n".join(problems))
    result._folder = recipe.folder
    return result


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors; `recipes/recipe.schema.json` holds it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(by_alias=True),
    }


def _read(path: Path) -> dict[str, Any]:
    if not os.path.isfile(path):  # unlike Path's, False for a name that no file can have
        raise UserError(
            f"{shown(path)}: no such file; recipes are JSON files such as recipes/smollm2-135m.json"
        )
    return read_json_object(path, unique_keys=True)


def _override(values: dict[str, Any], text: str) -> str | None:
    """Put one `a.b=c` into `values`; the problem with it, if there is one."""
    dotted, equals, given = text.partition("=")
    keys = dotted.strip().split(".")
    option = f"--set {shown(text)}"
    if not equals or not all(keys):
        return f"{option}: expected a.b=value, for example --set training.learning_rate=1e-4"
    try:
        value = parse_json(given, option, remedy="mend the value", unique_keys=True)
    except NotJson:
        value = given
    except UserError as error:
        return str(error)
    place: Any = values
    for number, key in enumerate(keys):
        last = number == len(keys) - 1
        if isinstance(place, list):
            indices = [str(index) for index in range(len(place))]
            if key not in indices:
                here = shown(".".join(keys[:number]))
                return f"{option}: {here} has {len(place)} entries, there is no {shown(repr(key))}"
            index: Any = indices.index(key)
        elif isinstance(place, dict):
            index = key
            if not last and place.get(key) is None:
                place[key] = {}
        else:
            here = shown(".".join(keys[:number]))
            return f"{option}: {here} is {_short(place)}, which has no parts"
        if last:
            place[index] = value
        else:
            place = place[index]
    return None


def _explain(details: ErrorDetails, changed: list[str]) -> str:
    """One problem in one line, from pydantic's account of it."""
    location, kind, given = details["loc"], details["type"], details["input"]
    if kind.startswith("union_tag"):
        location, given = (*location, "method"), given.get("method") if isinstance(given, dict) else given
    key = ".".join(str(part) for part in location if part not in TAGS)
    origin = " from --set" if any(key == name or key.startswith(name + ".") for name in changed) else ""
    key = shown(key)
    if kind == "extra_forbidden":
        return f"{key}{origin} is no known key{_nearest(location)}"
    if kind == "missing":
        return f"{key} is missing; it has no default"
    if kind == RULE:
        return details["msg"]
    message = details["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if kind.startswith("union_tag"):
        message = f"should be one of {', '.join(json.dumps(tag) for tag in TAGS)}"
    elif kind.startswith("model"):
        message = "should be an object"
    return f"{key} is {_short(given)}{origin}: {message}"


def _short(given: Any) -> str:
    try:
        return shown(json.dumps(given, ensure_ascii=False, default=str))
    except RecursionError:
        return f"a deeply nested {type(given).__name__}"


def _nearest(location: Location) -> str:
    """A hint for an unknown key: the nearest one beside it, or the same one elsewhere in a recipe."""
    path = [str(part) for part in location if isinstance(part, str)]
    known = list(_keys(Recipe))
    siblings = [key[-1] for key in known if list(key[:-1]) == path[:-1]]
    if matches := difflib.get_close_matches(path[-1], siblings, n=1):
        return f"; did you mean {matches[0]}?"
    if elsewhere := [key for key in known if key[-1] == path[-1]]:
        return f"; did you mean {'.'.join(part for part in elsewhere[0] if part not in TAGS)}?"
    return f"; there are {', '.join(siblings)}"


def _keys(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of a recipe as pydantic locates it, list indices left out."""
    for name, field in model.model_fields.items():
        here = (*prefix, field.alias or name)
        yield here
        for part in _models(field.annotation):
            tags = get_args(part.model_fields["method"].annotation) if "method" in part.model_fields else ()
            for place in [(*here, tag) for tag in tags] or [here]:
                yield from _keys(part, place)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _without_effect(recipe: Recipe) -> Iterator[str]:
    """Settings that differ from their default and that nothing reads in this combination."""
    adapter = recipe.adapter
    if not isinstance(adapter, CabrSettings):
        return
    norm = adapter.smagnorm if isinstance(adapter, SecuraAdapter) else SMagNorm(apply="never")
    if norm.apply == "never" and norm != SMagNorm(apply="never"):
        yield 'adapter.smagnorm has settings that have no effect with apply "never"'
    if adapter.selection != "calibrated" and adapter.calibration != Calibration():
        yield f'adapter.calibration has no effect with selection "{adapter.selection}"'
    if adapter.calibration.mode != "project" and adapter.calibration.energy != Calibration().energy:
        yield f'adapter.calibration.energy has no effect with mode "{adapter.calibration.mode}"'

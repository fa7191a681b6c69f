"""From a recipe's file and `--set` overrides to a checked `Recipe`, or to everything wrong with it."""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from secura_ds.errors import UserError, shown
from secura_ds.reading import NotJson, parse_json, read_json_object
from secura_ds.recipe.adapter import METHODS, Adapter, CabrSettings, Calibration, SecuraAdapter, SMagNorm
from secura_ds.recipe.base import RULE
from secura_ds.recipe.schema import Recipe
from secura_ds.recipe.sequence import SequenceRecipe

logger = logging.getLogger(__name__)

Location = tuple[int | str, ...]
Document = TypeVar("Document", Recipe, SequenceRecipe)
# pydantic puts the value that tells sections apart into the location of an error.
TAGS = {"method": METHODS, "kind": ("seq", "er", "ewc", "i-lora", "protect")}
_ALL_TAGS = tuple(tag for tags in TAGS.values() for tag in tags)


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: the recipe's JSON file; paths inside are relative to its folder, else to the current folder.
        overrides: `a.b=c` each; c is JSON, else a bare string. Lists have indices: `data.sources.0.path=x`.

    Raises:
        UserError: all problems, one a line: where, what was given, what is allowed, and the file.
    """
    recipe = _load(Recipe, Path(path), overrides)
    for warning in _without_effect(recipe.adapter, "adapter"):
        logger.warning("%s (%s)", warning, path)
    return recipe


def load_sequence_recipe(path: Path | str, overrides: Sequence[str] = ()) -> SequenceRecipe:
    """Read, override and check a recipe of task sequences; as `load_recipe`.

    Raises:
        UserError: all problems, one a line.
    """
    recipe = _load(SequenceRecipe, Path(path), overrides)
    for entry in recipe.entries:
        for warning in _without_effect(entry.adapter, f"entry {entry.name}: adapter"):
            logger.warning("%s (%s)", warning, path)
    return recipe


def describes_sequences(path: Path | str) -> bool:
    """Whether a recipe is one of task sequences (launch/continual.py), not of a training run.

    Raises:
        UserError: it cannot be read.
    """
    return "entries" in _read(Path(path))


def _own_mistakes(error: ValidationError) -> list[ErrorDetails]:
    """Without defaults that could not be chosen because of another mistake."""
    return [
        details
        for details in error.errors(include_url=False)
        if details["type"] != "default_factory_not_called"
    ]


def _load(kind: type[Document], path: Path, overrides: Sequence[str]) -> Document:
    values = _read(path)
    if ("entries" in values) != (kind is SequenceRecipe):
        if kind is Recipe:
            raise UserError(f"{path} describes task sequences: run it with launch/continual.py")
        if "adapter" in values:
            raise UserError(f"{path} describes a training run: run it with launch/train.py")
    problems = [problem for text in overrides if (problem := _override(values, text))]
    changed = [text.partition("=")[0].strip() for text in overrides]
    recipe = None
    try:
        recipe = kind.model_validate(values, context={"folder": path.resolve().parent})
    except ValidationError as error:
        problems += [_explain(details, changed, kind) for details in _own_mistakes(error)]
    if recipe is None or problems:
        raise UserError("\n".join(f"{problem} ({path})" for problem in problems))
    recipe._folder = path.resolve().parent
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
        problems += [_explain(details, names, Recipe) for details in _own_mistakes(error)]
    if problems:
        raise UserError("\n".join(problems))
    result._folder = recipe.folder
    return result


def recipe_schema(kind: type[Recipe] | type[SequenceRecipe] = Recipe) -> dict[str, Any]:
    """JSON Schema of a recipe, for editors; `recipes/*.schema.json` hold it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **kind.model_json_schema(by_alias=True),
    }


def _read(path: Path) -> dict[str, Any]:
    if not os.path.isfile(path):  # unlike Path's, False for a name that no file can have
        folder = ", and this is a folder" if os.path.isdir(path) else ""
        raise UserError(
            f"{shown(path)}: no such file; recipes are JSON files such as recipes/smollm2-135m.json, or for "
            f"launch/continual.py recipes/continual/smollm2-two-tasks.json{folder}"
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


def _explain(details: ErrorDetails, changed: list[str], document: type[BaseModel]) -> str:
    """One problem in one line, from pydantic's account of it."""
    location, kind, given = details["loc"], details["type"], details["input"]
    if kind.startswith("union_tag"):
        name = details["ctx"]["discriminator"].strip("'")
        location, given = (*location, name), given.get(name) if isinstance(given, dict) else given
    key = ".".join(str(part) for part in location if part not in _ALL_TAGS)
    origin = " from --set" if any(key == name or key.startswith(name + ".") for name in changed) else ""
    key = shown(key)
    if kind == "extra_forbidden":
        return f"{key}{origin} is no known key{_nearest(location, document)}"
    if kind == "missing":
        return f"{key} is missing; it has no default"
    if kind == RULE:
        return details["msg"]
    message = details["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if kind.startswith("union_tag"):
        message = f"should be one of {', '.join(json.dumps(tag) for tag in TAGS[name])}"
        if matches := difflib.get_close_matches(str(given), TAGS[name], n=1):
            message += f"; did you mean {matches[0]}?"
    elif kind.startswith("model"):
        message = "should be an object"
    return f"{key} is {_short(given)}{origin}: {message}"


def _short(given: Any) -> str:
    try:
        return shown(json.dumps(given, ensure_ascii=False, default=str))
    except RecursionError:
        return f"a deeply nested {type(given).__name__}"


def _nearest(location: Location, document: type[BaseModel]) -> str:
    """A hint for an unknown key: the nearest one beside it, or the same one of another kind or elsewhere."""
    path = [str(part) for part in location if isinstance(part, str)]
    known = list(_keys(document))
    siblings = [key[-1] for key in known if list(key[:-1]) == path[:-1]]
    if matches := difflib.get_close_matches(path[-1], siblings, n=1):
        return f"; did you mean {matches[0]}?"
    tagged = len(path) > 1 and path[-2] in _ALL_TAGS
    if tagged and (others := [key[-2] for key in known if (*key[:-2], key[-1]) == (*path[:-2], path[-1])]):
        return f"; it belongs to {', '.join(others)}, not to {path[-2]}"
    if elsewhere := [key for key in known if key[-1] == path[-1]]:
        return f"; did you mean {'.'.join(part for part in elsewhere[0] if part not in _ALL_TAGS)}?"
    return f"; there are {', '.join(siblings)}"


def _keys(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of a recipe as pydantic locates it, list indices left out."""
    for name, field in model.model_fields.items():
        here = (*prefix, field.alias or name)
        yield here
        for part in _models(field.annotation):
            tags = [
                tag
                for name in TAGS
                if name in part.model_fields and len(_models(field.annotation)) > 1
                for tag in get_args(part.model_fields[name].annotation)
            ]
            for place in [(*here, tag) for tag in tags] or [here]:
                yield from _keys(part, place)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _without_effect(adapter: Adapter, where: str) -> Iterator[str]:
    """Settings that differ from their default and that nothing reads in this combination."""
    if not isinstance(adapter, CabrSettings):
        return
    norm = adapter.smagnorm if isinstance(adapter, SecuraAdapter) else SMagNorm(apply="never")
    if norm.apply == "never" and norm != SMagNorm(apply="never"):
        yield f'{where}.smagnorm has settings that have no effect with apply "never"'
    if adapter.selection != "calibrated" and adapter.calibration != Calibration():
        yield f'{where}.calibration has no effect with selection "{adapter.selection}"'
    if adapter.calibration.mode != "project" and adapter.calibration.energy != Calibration().energy:
        yield f'{where}.calibration.energy has no effect with mode "{adapter.calibration.mode}"'
    if adapter.calibration.mode != "contrast" and adapter.calibration.floor != Calibration().floor:
        yield f'{where}.calibration.floor has no effect with mode "{adapter.calibration.mode}"'

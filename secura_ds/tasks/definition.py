"""Reading a task's YAML file: one definition, or everything wrong with it by file, line and field."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from secura_ds.errors import UserError, shown
from secura_ds.reading import read_text
from secura_ds.recipe.base import RULE
from secura_ds.tasks.fields import RUNS_CODE, TaskFields

_STANDARD = "tag:yaml.org,2002:"
Place = tuple[Path, yaml.Node, yaml.Node]
"""Where a field was given: its file, and its key and value there."""


@dataclass(frozen=True)
class Definition:
    """A checked file: what lm-eval is given, the same as typed fields, and where each field stands."""

    path: Path
    values: dict[str, Any]
    fields: TaskFields
    places: dict[str, Place]

    def where(self, key: str) -> str:
        """`file:line` of a field."""
        return _where(self.path, self.places, (key,))

    @property
    def data_files(self) -> dict[str, Path]:
        """The file of each split, for a task with files of its own."""
        files: dict[str, str] = self.fields.dataset_kwargs.get("data_files", {})
        folder = self.places["dataset_kwargs"][0].parent
        return {split: folder / file for split, file in files.items()}


def task_name(path: Path) -> str | None:
    """The name a YAML file gives its task; None for a file that others include.

    Raises:
        UserError: it is no YAML file.
    """
    _, values = _parse(path)
    name = values.get("task")
    return name if isinstance(name, str) else None


def read_definition(path: Path) -> Definition:
    """Read and check a task's file, and the files it includes.

    Raises:
        UserError: all problems, one a line: file, line, field, what was given and what is allowed.
    """
    values, places = _merged(path, ())
    problems = []
    for key in RUNS_CODE:
        if key in values:
            where = _where(path, places, (key,))
            problems.append(f"{where}: {key} runs Python code, which only lm-eval's own tasks may; remove it")
            del values[key]
    try:
        fields = TaskFields.model_validate(values)
    except ValidationError as error:
        problems += [_explain(path, places, details) for details in error.errors(include_url=False)]
    if problems:
        raise UserError("\n".join(problems))
    return Definition(path, values, fields, places)


def _merged(path: Path, including: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, Place]]:
    """The fields of a file over those of the files it includes, as lm-eval merges them."""
    if path.resolve() in including:
        raise UserError(f"{path}: the file includes itself; remove one include")
    node, values = _parse(path)
    included = values.pop("include", [])
    names = included if isinstance(included, list) else [included]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: include is {shown(included)}; it names one YAML file or a list of them")
    merged: dict[str, Any] = {}
    places: dict[str, Place] = {}
    for name in names:
        base_values, base_places = _merged(path.parent / name, (*including, path.resolve()))
        merged |= base_values
        places |= base_places
    places |= {key.value: (path, key, value) for key, value in node.value}
    return merged | values, places


def _parse(path: Path) -> tuple[yaml.MappingNode, dict[str, Any]]:
    text = read_text(path)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}: expected fields and values, as lm-eval's task files have them")
        _refuse_tags(path, node)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not YAML ({error.problem}); mend that line") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: not YAML ({shown(error)}); mend the file") from error
    keys = [key.value for key, _ in node.value]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(f"{path}: {shown(twice)} is given twice; keep one")
    return node, {str(key): value for key, value in values.items()}


def _refuse_tags(path: Path, root: yaml.Node) -> None:
    """`!function` names Python code to run; no tag but YAML's own is part of a declaration."""
    for node in _nodes(root):
        if not node.tag.startswith(_STANDARD) or node.tag.startswith(f"{_STANDARD}python"):
            what = "runs Python code" if node.tag == "!function" else "is no value"
            raise UserError(
                f"{path}:{node.start_mark.line + 1}: {shown(node.tag)} {what}; only lm-eval's own tasks may "
                "have such tags: write a template, or prepare the rows beforehand"
            )


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def _explain(path: Path, places: dict[str, Place], details: ErrorDetails) -> str:
    """One problem in one line, from pydantic's account of it."""
    location, kind = details["loc"], details["type"]
    if kind == RULE:
        context = details["ctx"]
        return f"{_where(path, places, (context['key'],))}: {context['message']}"
    key = shown(".".join(str(part) for part in location))
    where = _where(path, places, location)
    if kind == "missing":
        return f"{where}: {key} is missing; it has no default"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), TaskFields.model_fields, n=1)
        hint = f"; did you mean {near[0]}?" if near and len(location) == 1 else "; remove it"
        return f"{where}: {key} is no field of a declared task{hint}"
    message = details["msg"].removeprefix("Value error, ").replace("Input should", "should")
    return f"{where}: {key} is {shown(details['input'])}: {message}"


def _where(path: Path, places: dict[str, Place], location: tuple[int | str, ...]) -> str:
    """`file:line` of the innermost part of a location that the file has."""
    if not location or str(location[0]) not in places:
        return f"{path}:1"
    path, node, value = places[str(location[0])]
    for part in location[1:]:
        inner = _inner(value, part)
        if inner is None:
            break
        node = value = inner
    return f"{path}:{node.start_mark.line + 1}"


def _inner(node: yaml.Node, part: int | str) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        return next((value for key, value in node.value if key.value == part), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        found: yaml.Node = node.value[part]
        return found
    return None

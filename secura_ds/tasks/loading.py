"""From names to tasks: lm-eval's own, those of YAML files in folders, and single YAML files."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict

from secura_ds.errors import UserError, first_line, shown
from secura_ds.reading import read_rows
from secura_ds.tasks.definition import Definition, read_definition, task_name
from secura_ds.tasks.task import Task

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

NEAREST = 4


class _HubError(UserError):
    """A hub data set cannot be loaded."""


def load_tasks(names: Sequence[str], folders: Sequence[Path]) -> list[Task]:
    """The tasks of these names, in this order.

    Args:
        names: of a YAML file in `folders`, else of lm-eval's own tasks; or the path of a YAML file.
        folders: searched with all folders in them.

    Raises:
        UserError: all problems, one a line: an unknown name, with the nearest ones; a file's wrong field; a
            hub data set that cannot be loaded, and which of the tasks need the hub.
    """
    index = _Index(folders)
    tasks: list[Task] = []
    problems: list[str] = []
    lost: list[str] = []
    for number, name in enumerate(names):
        if name in names[:number]:
            problems.append(f"the task {shown(name)} is given twice; name each once")
            continue
        try:
            tasks.append(_load(name, index))
        except UserError as error:
            problems.append(str(error))
            lost += [name] if isinstance(error, _HubError) else []
    for number, task in enumerate(tasks):
        if task.name in [other.name for other in tasks[:number]]:
            problems.append(f"two of the tasks are called {task.name}; rename one in its file")
    if lost:
        need = [task.name for task in tasks if task.needs_hub] + lost
        rest = [task.name for task in tasks if not task.needs_hub]
        without = f"without it: {', '.join(rest)}" if rest else "none of those asked for does without it"
        problems.append(f"these tasks need the hub: {', '.join(need)}; {without}")
    if problems:
        raise UserError("\n".join(problems))
    return tasks


class _Index:
    """The YAML files of folders by the names of their tasks; files that cannot be read are kept aside."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = list(map(Path, folders))
        self.files: dict[str, Path] = {}
        self.broken: list[str] = []
        for folder in self.folders:
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder of tasks; check the path")
            for path in sorted(folder.rglob("*.yaml")):
                self._add(path)

    def _add(self, path: Path) -> None:
        try:
            name = task_name(path)
        except UserError as error:
            self.broken.append(str(error))
            return
        if name is None:
            return
        other = self.files.setdefault(name, path)
        if other.resolve() != path.resolve():
            self.broken.append(f"{path} and {other} both define the task {name}; rename one")


def _load(name: str, index: _Index) -> Task:
    if name in index.files:
        if clash := [problem for problem in index.broken if problem.endswith(f"task {name}; rename one")]:
            raise UserError(clash[0])
        return _declared(read_definition(index.files[name]))
    if name.endswith((".yaml", ".yml")):
        return _declared(read_definition(Path(name)))
    from lm_eval.tasks._index import Kind

    entry = _manager(own=True).task_index.get(name)
    if entry is None:
        raise UserError("\n".join([*index.broken, _unknown(name, index)]))
    if entry.kind not in (Kind.TASK, Kind.PY_TASK):
        members = entry.tags or (entry.cfg or {}).get("task") or ()
        inner = [member for member in members if isinstance(member, str)]
        raise UserError(
            f"{name} is a group of tasks; name single ones: {shown(', '.join(sorted(inner)) or 'none', 200)}"
        )
    return _built_in(name)


def _unknown(name: str, index: _Index) -> str:
    known = [*index.files, *_manager(own=True).all_subtasks]
    near = difflib.get_close_matches(name, known, n=NEAREST, cutoff=0.5)
    folders = ", ".join(map(str, index.folders)) or "no folder"
    return (
        f"no task is called {shown(name)}{'; the nearest are ' + ', '.join(near) if near else ''} "
        f"(lm-eval's tasks, and YAML files in {folders})"
    )


@cache
def _manager(*, own: bool) -> TaskManager:
    """lm-eval's maker of tasks; with `own`, it has read the names of its own thirteen thousand (7 s)."""
    from lm_eval.tasks import TaskManager

    from secura_ds.tasks.harness import quiet

    with quiet():
        return TaskManager(include_defaults=own)


def _built_in(name: str) -> Task:
    from secura_ds.tasks.harness import quiet

    with quiet():
        try:
            task: ConfigurableTask = _manager(own=True).load([name])["tasks"][name]
        except Exception as error:  # the hub's client raises a dozen unrelated types
            if not _in_download(error):
                raise UserError(
                    f"lm-eval's task {name} cannot be made: {shown(first_line(error), 200)}"
                ) from error
            config = (_manager(own=True).task_index[name].cfg or {}).get
            raise _unreachable(name, config("dataset_path"), config("dataset_name"), error) from error
    if task.get_config("unsafe_code"):
        raise UserError(f"lm-eval's task {name} runs code that the model writes; it is refused")
    made = Task(task, needs_hub=True)
    if task.higher_is_better().get(made.metric) is False:
        raise UserError(
            f"lm-eval's task {name} is scored by {made.metric}, of which less is better: name one "
            "whose first metric is better where it is higher"
        )
    return made


def _declared(definition: Definition) -> Task:
    """A task of a checked file; lm-eval gets its local rows in memory, and leaves no file anywhere."""
    from secura_ds.tasks.harness import quiet

    fields = definition.fields
    # Without samples, lm-eval would make a list of all training rows, of which nothing is asked.
    values = {**definition.values, "fewshot_config": {"samples": []}}
    rows: dict[str, list[dict[str, Any]]] = {}
    if fields.is_local:
        rows = {split: _rows(path) for split, path in definition.data_files.items()}
        dataset = DatasetDict({split: _dataset(definition, split, found) for split, found in rows.items()})
        del values["dataset_kwargs"]
        values["custom_dataset"] = lambda **_: dataset
    with quiet():
        try:
            task: ConfigurableTask = _manager(own=False).load([values])["tasks"][fields.task]
        except Exception as error:  # templates are programs, the hub's client raises a dozen types
            if not fields.is_local and _in_download(error):
                raise _unreachable(fields.task, fields.dataset_path, fields.dataset_name, error) from error
            raise _unrenderable(definition, rows, error) from error
    _refuse_constants(definition, list(next(iter(task.eval_docs), {})))
    return Task(task, needs_hub=not fields.is_local)


def _refuse_constants(definition: Definition, columns: Sequence[str]) -> None:
    """A word that is neither a template nor a column is the same for all rows: a column's name, misspelt."""
    for key in ("doc_to_text", "doc_to_target"):
        given = definition.values[key]
        constant = isinstance(given, str) and not any(sign in given for sign in ("{{", "{%"))
        if constant and not given.isdigit() and given not in columns:
            raise UserError(
                f"{definition.where(key)}: {key} is {shown(given)}, which is no column of the rows "
                f"({shown(', '.join(columns))}) and no template with {{{{ }}}}: all rows would have the same"
            )


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file, all with the same columns: a template would write None for one that lacks."""
    found = read_rows(path)
    columns = list(found[0][1])
    for where, row in found:
        if set(row) != set(columns):
            raise UserError(
                f"{where}: the columns are {shown(', '.join(row))}; the first row has "
                f"{shown(', '.join(columns))}: give all rows the same"
            )
    return [row for _, row in found]


def _dataset(definition: Definition, split: str, rows: list[dict[str, Any]]) -> Dataset:
    try:
        return Dataset.from_list(rows)
    except Exception as error:  # pyarrow's own types of errors, for values of several types in a column
        raise UserError(
            f"{definition.data_files[split]}: a column holds values of several types "
            f"({shown(first_line(error))}); give each column one"
        ) from error


def _unrenderable(
    definition: Definition, rows: Mapping[str, list[dict[str, Any]]], error: Exception
) -> UserError:
    """Which field does not fit the first row that is scored."""
    from secura_ds.tasks.harness import rendered

    row = rows.get(definition.fields.scored_split or "", [{}])[0]
    for key in ("description", "doc_to_text", "doc_to_target", "doc_to_choice", "gen_prefix"):
        template = definition.values.get(key)
        if not isinstance(template, str) or template in row or not row:
            continue
        try:
            rendered(template, row)
        except Exception as reason:
            return UserError(
                f"{definition.where(key)}: {key} does not fit the rows ({shown(first_line(reason))}); their "
                f"columns are {shown(', '.join(row))}"
            )
    return UserError(
        f"{definition.path}: lm-eval cannot make this task of its rows: {shown(first_line(error), 200)}"
    )


def _in_download(error: BaseException) -> bool:
    """Whether an error comes from lm-eval's loading of a data set, and not from what is done with it."""
    return any(frame.name == "download" for frame in traceback.extract_tb(error.__traceback__))


def _unreachable(name: str, path: object, subset: object, error: Exception) -> _HubError:
    part = f" (subset {subset})" if subset else ""
    return _HubError(
        f"{name}: the hub data set {path}{part} cannot be loaded: {shown(first_line(error), 160)}"
    )

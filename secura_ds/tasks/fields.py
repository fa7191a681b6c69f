"""The fields a task's YAML file may have: those of lm-eval's format that declare, and none that runs code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from secura_ds.recipe.base import RULE, Section

GENERATED = ("exact_match", "json_exact_match", "bleu", "chrf", "ter", "rouge1", "rougeL")
"""Metrics of answers that the model writes; the main one cannot be `ter`, of which less is better."""
CHOSEN = ("acc", "acc_norm")
"""Metrics of choices by likelihood: as it is, and divided by the choice's length."""

RUNS_CODE = (
    "class", "custom_dataset", "fewshot_config", "process_docs", "process_results", "unsafe_code",
    "use_prompt",
)  # fmt: skip
"""Fields of lm-eval's format by which a file could run Python; only lm-eval's own tasks may have them."""

_HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")


class Metric(Section):
    """One entry of `metric_list`; the first one is the task's main metric."""

    metric: str
    aggregation: Literal["mean", "bleu", "chrf", "ter"] | None = None
    higher_is_better: bool | None = None
    ignore_case: bool = False
    ignore_punctuation: bool = False
    ignore_numbers: bool = False
    regexes_to_ignore: list[str] = []


class FilterStep(Section):
    """One step from what the model wrote to the answer that is scored."""

    function: Literal["regex", "take_first", "lowercase", "uppercase", "remove_whitespace"]
    regex_pattern: str | None = None
    group_select: int | None = None
    fallback: str | None = None


class Filter(Section):
    """Steps with a name."""

    name: str
    filter: list[FilterStep] = Field(min_length=1)


class Generation(Section):
    """How an answer is written: always greedily."""

    until: list[str] | str
    max_gen_toks: int = Field(gt=0)
    do_sample: Literal[False] = False


class TaskFields(Section):
    """A whole file; lm-eval's documentation of task files says what each field means."""

    task: str = Field(pattern=r"^[\w.+-]+$")
    task_alias: str | None = None
    tag: str | list[str] | None = None
    dataset_path: str
    dataset_name: str | None = None
    dataset_kwargs: dict[str, Any] = {}
    training_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    fewshot_split: str | None = None
    output_type: Literal["generate_until", "multiple_choice"]
    description: str = ""
    doc_to_text: str
    doc_to_target: str | int
    doc_to_choice: str | list[str] | None = None
    gen_prefix: str | None = None
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    num_fewshot: Literal[0] = 0
    generation_kwargs: Generation | None = None
    filter_list: list[Filter] = []
    metric_list: list[Metric] = Field(min_length=1)
    should_decontaminate: Literal[False] = False
    metadata: dict[str, Any] = {}

    @property
    def scored_split(self) -> str | None:
        """The split that scores come from."""
        return self.test_split or self.validation_split

    @property
    def is_local(self) -> bool:
        """True where the rows are JSONL files beside the task's file."""
        return self.dataset_path == "json"

    @model_validator(mode="after")
    def _splits(self) -> TaskFields:
        if self.scored_split is None:
            raise _rule("test_split", "test_split is missing; it names the split that is scored")
        if self.training_split == self.scored_split:
            raise _rule(
                "training_split",
                f"training_split is {self.training_split}, the split that is scored; name another or none",
            )
        return self

    @model_validator(mode="after")
    def _answers(self) -> TaskFields:
        chosen = self.output_type == "multiple_choice"
        allowed = CHOSEN if chosen else GENERATED
        for entry in self.metric_list:
            if entry.metric not in allowed:
                raise _rule(
                    "metric_list",
                    f"metric_list has {entry.metric}; {self.output_type} has {', '.join(allowed)}",
                )
        if self.metric_list[0].metric == "ter":
            raise _rule(
                "metric_list",
                "metric_list begins with ter, of which less is better; put another metric first",
            )
        if chosen and self.doc_to_choice is None:
            raise _rule("output_type", "doc_to_choice is missing; it gives the choices of multiple_choice")
        if not chosen and self.generation_kwargs is None:
            raise _rule(
                "output_type", "generation_kwargs is missing; generate_until needs until and max_gen_toks"
            )
        for name in ("generation_kwargs", "filter_list") if chosen else ("doc_to_choice",):
            if getattr(self, name):
                raise _rule(name, f"{name} has no effect with output_type {self.output_type}; remove it")
        return self

    @model_validator(mode="after")
    def _data(self) -> TaskFields:
        if not self.is_local:
            if not _HUB_NAME.fullmatch(self.dataset_path):
                raise _rule(
                    "dataset_path",
                    f"dataset_path is {self.dataset_path}; it is json, for JSONL files beside this file, or "
                    "owner/name of a data set of the hub",
                )
            if unknown := set(self.dataset_kwargs) - {"revision"}:
                raise _rule(
                    "dataset_kwargs",
                    f"dataset_kwargs has {', '.join(sorted(unknown))}; a hub data set may have revision",
                )
            return self
        files = self.dataset_kwargs.get("data_files")
        if set(self.dataset_kwargs) != {"data_files"} or not isinstance(files, dict) or not _are_names(files):
            raise _rule(
                "dataset_kwargs",
                "dataset_kwargs should be data_files: {train: train.jsonl, test: test.jsonl}",
            )
        for name in ("training_split", "validation_split", "test_split"):
            split = getattr(self, name)
            if split is not None and split not in files:
                raise _rule(name, f"{name} is {split}; data_files has {', '.join(files)}")
        return self


def _are_names(files: Mapping[Any, Any]) -> bool:
    return bool(files) and all(isinstance(name, str) for pair in files.items() for name in pair)


def _rule(key: str, message: str) -> PydanticCustomError:
    return PydanticCustomError(RULE, "{message}", {"key": key, "message": message})

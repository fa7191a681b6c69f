"""One task: its examples to learn, to validate and to be scored on, in lm-eval's own words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from secura_ds.data import Example
from secura_ds.errors import UserError, first_line, shown

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

SEED = 0
VALIDATION_SHARE = 1 / 6
MOST_VALIDATION = 200
"""What is cut off the training rows where a task has no validation split of its own."""
MAXIMA = {"bleu": 100.0, "chrf": 100.0, "chrf++": 100.0, "ter": 100.0}


class Task:
    """A task of lm-eval, with what training on it needs.

    A prompt is what lm-eval asks, a completion what it expects or, of a multiple choice, the right one's
    text. Both come out of lm-eval's own functions, so that a model is trained on what it is scored on.
    """

    def __init__(self, harness: ConfigurableTask, *, needs_hub: bool) -> None:
        self.harness, self.needs_hub = harness, needs_hub
        harness.set_config("num_fewshot", 0)

    @property
    def name(self) -> str:
        """The name it is asked for by."""
        return str(self.harness.config.task)

    @property
    def metric(self) -> str:
        """The main metric: the first one the task lists."""
        return str(next(iter(self.harness.aggregation())))

    @property
    def maximum(self) -> float:
        """The best score of the main metric."""
        return MAXIMA.get(self.metric, 1.0)

    @property
    def is_choice(self) -> bool:
        """True where the likelihoods of choices are compared and nothing is written."""
        return str(self.harness.OUTPUT_TYPE) == "multiple_choice"

    @cached_property
    def chance(self) -> float:
        """Expected score of guessing: the mean of 1 / choices over the scored rows; 0 for written answers."""
        if not self.is_choice:
            return 0.0
        return float(np.mean([1 / len(self.harness.doc_to_choice(row)) for row in self._scored]))

    def training_examples(self, limit: int | None = None, *, chat: bool = True) -> list[Example]:
        """Rows to learn from, in a seeded order; none of them is for validation or scored.

        Args:
            limit: at most so many.
            chat: for a tokenizer with a chat template. Without one, prompt and completion are plain text and
                the completion begins with the task's delimiter, mostly a blank.

        Raises:
            UserError: the task has no training rows, or a row no answer.
        """
        rows, validation = self._training
        order = self._order[0 if self._has_validation else validation :]
        return self._examples(rows, order[:limit], "training", chat)

    def validation_examples(self, limit: int | None = None, *, chat: bool = True) -> list[Example]:
        """Rows to choose settings by: of the task's validation split, or cut off its training rows.

        Raises:
            UserError: as for `training_examples`.
        """
        if self._has_validation:
            rows = self.harness.validation_docs()
            return self._examples(rows, range(len(rows))[:limit], "validation", chat)
        rows, validation = self._training
        return self._examples(rows, self._order[:validation][:limit], "training", chat)

    def held_out_examples(self, limit: int | None = None, *, chat: bool = True) -> list[Example]:
        """The scored rows, in the order of scoring.

        Raises:
            UserError: a row has no answer.
        """
        return self._examples(self._scored, range(len(self._scored))[:limit], "scored", chat)

    @cached_property
    def _scored(self) -> Sequence[dict[str, Any]]:
        rows: Sequence[dict[str, Any]] = self.harness.eval_docs
        return rows

    @property
    def _has_validation(self) -> bool:
        """Whether there is a validation split that is neither scored nor learnt."""
        own = self.harness.has_test_docs() and self.harness.has_validation_docs()
        config = self.harness.config
        return bool(own) and config.validation_split not in (config.test_split, config.training_split)

    @cached_property
    def _training(self) -> tuple[Sequence[dict[str, Any]], int]:
        """All training rows, and how many of them are for validation."""
        config = self.harness.config
        if not self.harness.has_training_docs():
            raise UserError(f"{self.name} has no training split: it can be scored, but not trained on")
        if config.training_split == (config.test_split or config.validation_split):
            raise UserError(
                f"{self.name} would train on {config.training_split}, which is scored; it can only be scored"
            )
        rows = self.harness.training_docs()
        return rows, min(MOST_VALIDATION, int(len(rows) * VALIDATION_SHARE))

    @cached_property
    def _order(self) -> list[int]:
        order: list[int] = np.random.default_rng(SEED).permutation(len(self._training[0])).tolist()
        return order

    def _examples(
        self, rows: Sequence[dict[str, Any]], indices: Sequence[int], split: str, chat: bool
    ) -> list[Example]:
        return [
            self._example(rows[index], f"{self.name}, {split} row {index + 1}", chat=chat)
            for index in indices
        ]

    def _example(self, row: dict[str, Any], where: str, *, chat: bool) -> Example:
        harness = self.harness
        try:
            prefix = harness.doc_to_prefix(row)
            context = harness.fewshot_context(
                row,
                num_fewshot=0,
                apply_chat_template=chat,
                chat_template=_messages if chat else None,
                gen_prefix=prefix,
            )
            answer = self._choice(row, context, chat) if self.is_choice else self._target(row)
        except UserError:
            raise
        except Exception as error:  # templates and lm-eval's own functions fail in any way
            raise UserError(
                f"{where}: the row does not fit the task: {shown(first_line(error), 200)}"
            ) from error
        if isinstance(answer, tuple):  # the choices are in the prompts, what follows is the same for all
            context, answer = answer
        if answer is None or not answer.strip():
            raise UserError(f"{where}: the row has no right answer, so there is nothing to learn or to score")
        if not self.is_choice:
            answer = self._delimiter(prefix, chat) + answer
        if isinstance(context, str):
            turns = [{"role": "user", "content": context}]
        else:
            turns = list(context)
            if prefix:
                answer = turns.pop()["content"] + answer
        return Example(where, messages=(*turns, {"role": "assistant", "content": answer}))

    def _target(self, row: dict[str, Any]) -> str | None:
        """The expected answer; the first one of several."""
        target = self.harness.doc_to_target(row)
        if self.harness.config.doc_to_choice is not None:
            target = self.harness.doc_to_choice(row)[target]
        if isinstance(target, list | tuple):
            target = target[0] if target else None
        return None if target is None else str(target)

    def _choice(self, row: dict[str, Any], context: Any, chat: bool) -> tuple[Any, str] | None:
        """Context and continuation of the right choice, as lm-eval asks for its likelihood."""
        requests = self.harness.construct_requests(
            doc=row, ctx=context, metadata=(self.name, 0, 1), apply_chat_template=chat
        )
        several = self.harness.multiple_input
        gold = self.harness.doc_to_text(row) if several else self.harness.doc_to_target(row)
        choices = self.harness.doc_to_choice(row)
        if isinstance(gold, list | tuple):
            gold = gold[0] if gold else None
        if isinstance(gold, str):
            gold = choices.index(gold) if gold in choices else None
        if not isinstance(gold, int) or not 0 <= gold < len(choices):
            return None
        arguments: tuple[Any, str] = requests[gold].arguments
        return arguments

    def _delimiter(self, prefix: str | None, chat: bool) -> str:
        """What stands between a prompt, or the beginning of the answer that is given, and the answer."""
        if prefix:
            return "" if prefix[-1].isspace() else " "
        return "" if chat else str(self.harness.config.target_delimiter)


def _messages(messages: list[dict[str, str]], **_: Any) -> list[dict[str, str]]:
    """In place of a chat template: the messages themselves, for the trainer to render."""
    return messages

"""The one place that reaches into lm-eval: quiet, sandboxed, and asking with the tokens of training.

Importing lm-eval takes seconds, so this module is imported inside functions only.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import lm_eval.api.task
import lm_eval.utils
import torch
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.metrics import mean, mean_stderr
from lm_eval.api.registry import register_metric
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_ds.data.encoding import inner_tokens, plain_tokens, render
from secura_ds.environment import is_main_process
from secura_ds.evaluation.batching import pad_left
from secura_ds.evaluation.metrics import canonical_json
from secura_ds.evaluation.task import greedy

__all__ = ["AskedModel", "evaluate", "mean", "mean_stderr", "quiet", "rendered"]

logger = logging.getLogger(__name__)


def _sandbox() -> SandboxedEnvironment:
    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = lm_eval.utils.regex_replace
    return environment


# Templates come with task files, and lm-eval renders them without a sandbox.
lm_eval.utils.env = _sandbox()
rendered = lm_eval.utils.apply_template


@register_metric(metric="json_exact_match", higher_is_better=True, aggregation="mean")
def _json_exact_match(references: Sequence[str], predictions: Sequence[str]) -> float:
    found = canonical_json(predictions[0])
    return float(found is not None and found == canonical_json(references[0]))


def _rouge(kind: str, references: Sequence[str], predictions: Sequence[str]) -> float:
    return float(RougeScorer([kind]).score(references[0], predictions[0])[kind].fmeasure)


for _kind in ("rouge1", "rougeL"):
    register_metric(metric=_kind, higher_is_better=True, aggregation="mean")(partial(_rouge, _kind))


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block lm-eval logs errors only and shows no bars of its own preparations."""
    root = logging.getLogger("lm_eval")
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with _replaced(lm_eval.api.task, "tqdm", partial(tqdm, disable=True)):
            yield
    finally:
        root.setLevel(level)


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Inside the block `owner` itself has another attribute of this name."""
    own = vars(owner)
    before = {name: own[name]} if name in own else {}
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        for key, found in before.items():
            setattr(owner, key, found)


class AskedModel(HFLM):
    """A live model for lm-eval: asked with the tokens it is trained on, answering greedily.

    lm-eval takes it for one process's model, so that under ZeRO-3 every rank runs all the same batches.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, *, progress: bool
    ) -> None:
        # lm-eval ties the weights of a model it is given; slices and adapters are to be left alone.
        with _replaced(model, "tie_weights", lambda *_, **__: None):
            super().__init__(
                pretrained=model,
                backend="causal",
                tokenizer=copy.deepcopy(tokenizer),  # lm-eval gives one without a padding token one
                batch_size=batch_size,
                softmax_dtype="float32",
            )
        self._silent = not (progress and is_main_process())

    @property
    def has_template(self) -> bool:
        """Whether prompts are turns of a chat."""
        return self.tokenizer.chat_template is not None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of the turns; of an answer whose beginning is given, up to that beginning."""
        if add_generation_prompt:
            return render(self.tokenizer, chat_history, "the prompt", ask=True)
        asked = render(self.tokenizer, chat_history[:-1], "the prompt", ask=True)
        return asked + chat_history[-1]["content"]

    def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
        """Tokens of a prompt, as `render_prompt` has them."""
        return (
            inner_tokens(self.tokenizer, string)
            if self.has_template
            else plain_tokens(self.tokenizer, string)
        )

    def tok_batch_encode(
        self, strings: list[str], *_: Any, left_truncate_len: int | None = None, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Prompts as a batch, padded to the left; ids and mask."""
        rows = [self.tok_encode(string) for string in strings]
        if left_truncate_len and (longest := max(map(len, rows))) > left_truncate_len:
            logger.warning(
                "a prompt of %d tokens loses its beginning: %d tokens fit beside the answer",
                longest,
                left_truncate_len,
            )
            rows = [row[-left_truncate_len:] for row in rows]
        return pad_left(rows, self.tokenizer, torch.device("cpu"))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # lm-eval would tokenize both as one text; in training a prompt and its answer are two.
        return self.tok_encode(context), inner_tokens(self.tokenizer, continuation)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm or self._silent)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The answers, without blanks at their ends."""
        answers: list[str] = super().generate_until(requests, disable_tqdm or self._silent)
        return [answer.strip() for answer in answers]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **given: Any) -> Tensor:
        output: Tensor = self.model.generate(
            input_ids=context,
            attention_mask=given["attention_mask"],
            generation_config=greedy(self.model, self.tokenizer, max_length - context.shape[1]),
            stopping_criteria=stop_sequences_criteria(
                self.tokenizer, stop, context.shape[1], context.shape[0]
            ),
        )
        return output

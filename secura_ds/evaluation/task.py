"""The task: answers are generated greedily for held-out prompts and scored against what was expected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from secura_ds.data import Example, load_examples, render_prompt
from secura_ds.data.encoding import render
from secura_ds.errors import UserError
from secura_ds.evaluation.batching import batches, pad_left
from secura_ds.evaluation.metrics import METRICS
from secura_ds.recipe import Source, Task

KEPT_EXAMPLES = 200


def score_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    resolve_path: Callable[[str], Path],
    batch_size: int,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Score of `task` with its standard error; the first answers are kept in the order of the file.

    Raises:
        UserError: the file is bad, or a row has no answer to expect.
    """
    items = load_examples(Source(path=str(resolve_path(task.path)), max_examples=task.max_items))
    prompts = [_prompt_of(item) for item in items]
    expected = [str(item.messages[-1]["content"]) for item in items]
    encoded = [
        render_prompt(prompt, tokenizer, item.where) for prompt, item in zip(prompts, items, strict=True)
    ]
    answers = generate(model, tokenizer, encoded, task.max_new_tokens, batch_size, progress=progress)
    score, stderr, right = METRICS[task.metric](answers, expected)
    rows = zip(prompts, expected, answers, right, strict=True)
    examples = [
        {"prompt": prompt[-1]["content"], "expected": wanted, "answer": answer, "correct": correct}
        for prompt, wanted, answer, correct in list(rows)[:KEPT_EXAMPLES]
    ]
    return {"metric": task.metric, "score": score, "stderr": stderr, "n": len(items), "examples": examples}


def _prompt_of(item: Example) -> list[dict[str, Any]]:
    if item.text is not None or item.messages[-1]["role"] != "assistant" or len(item.messages) < 2:
        raise UserError(
            f"{item.where}: a task row needs a prompt and an expected answer: fields prompt and completion, "
            "instruction and output, or messages that end with an assistant turn"
        )
    return list(item.messages[:-1])


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    *,
    progress: bool = True,
) -> list[str]:
    """Greedy answers, in the order of `prompts`, without special tokens and blanks at the ends."""
    settings = greedy(model, tokenizer, max_new_tokens)
    answers = [""] * len(prompts)
    for batch in batches(prompts, batch_size, len, "task", progress=progress):
        ids, mask = pad_left([prompts[i] for i in batch], tokenizer, model.device)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        for i, row in zip(batch, output[:, ids.shape[1] :], strict=True):
            answers[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return answers


def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Settings of greedy answers; what is left out, the model's own would fill in (Qwen's penalty, say)."""
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    )


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: eos, what the model's own settings add, and the end of a chat turn."""
    found = {tokenizer.eos_token_id}
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    found.update(own if isinstance(own, list) else [own])
    if tokenizer.chat_template is not None:
        found.add(_turn_end(tokenizer))
    return sorted(token for token in found if token is not None)


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that closes an assistant turn, Gemma's `<end_of_turn>` say."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = render(tokenizer, turns, "the end of a turn").rstrip()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    last = ids[-1] if ids else None
    added = tokenizer.added_tokens_decoder.get(last)
    return last if added is not None and added.special else None

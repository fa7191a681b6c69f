"""From an example to token ids and labels: chat template, special tokens once, end token, loss mask.

A conversation is rendered to text by the backbone's chat template, cut where each assistant turn begins and
ends, and each piece is tokenized on its own. So a prompt has exactly the tokens it has when the model is
asked, and a token never straddles the border between what is learnt and what is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from secura_ds.data.sources import Example
from secura_ds.errors import UserError, first_line, shown

IGNORED = -100
"""Label of a token that is not learnt."""


@dataclass(frozen=True)
class EncodedExample:
    """Token ids and labels of one example, of equal length; a label is the id itself or `IGNORED`."""

    input_ids: list[int]
    labels: list[int]
    was_cut: bool

    @property
    def num_learnt(self) -> int:
        """How many tokens carry loss; the first one never does, since nothing comes before it."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, max_length: int, completion_only: bool = True
) -> EncodedExample:
    """Tokenize one example.

    Conversations are learnt in their assistant turns, up to and with the token that ends a turn. A prompt and
    completion for a tokenizer without a chat template are joined as they are. Plain text is learnt whole.

    Raises:
        UserError: the chat template refuses the conversation, or renders a turn differently once more follow.
    """
    ids: list[int] = []
    labels: list[int] = []
    for text, learnt, starts in _pieces(example, tokenizer):
        piece = plain_tokens(tokenizer, text) if starts else inner_tokens(tokenizer, text)
        if learnt and not _ends_turn(tokenizer, piece) and tokenizer.eos_token_id is not None:
            piece = [*piece, tokenizer.eos_token_id]
        ids += piece
        labels += piece if learnt or not completion_only else [IGNORED] * len(piece)
    return EncodedExample(ids[:max_length], labels[:max_length], was_cut=len(ids) > max_length)


def render_prompt(
    prompt: str | Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str = "the prompt"
) -> list[int]:
    """Token ids of a prompt as the model is asked it; the same as the prompt's part of a training example.

    Raises:
        UserError: there is no chat template for a prompt of several turns, or it refuses them.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if tokenizer.chat_template is None:
        if [message["role"] for message in messages] != ["user"]:
            raise _no_template(where)
        return plain_tokens(tokenizer, messages[0]["content"])
    return inner_tokens(tokenizer, render(tokenizer, messages, where, ask=True))


def _pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool, bool]]:
    """(text, whether it is learnt, whether the tokenizer is to add its own start token) in order."""
    if example.text is not None:
        return [(example.text, True, True)]
    if tokenizer.chat_template is None:
        if not example.is_pair:
            raise _no_template(example.where)
        prompt, completion = (message["content"] for message in example.messages)
        return [(prompt, False, True), (completion, True, False)]
    return [(text, learnt, False) for text, learnt in _turns(example, tokenizer)]


def _no_template(where: str) -> UserError:
    return UserError(
        f"{where}: the backbone has no chat template, so a conversation cannot be rendered: use its instruct "
        "version, or rows of prompt and completion alone"
    )


def _turns(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    messages = list(example.messages)
    whole = render(tokenizer, messages, example.where)
    pieces: list[tuple[str, bool]] = []
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:index], example.where, ask=True)
        after = render(tokenizer, messages[: index + 1], example.where)
        if not (whole.startswith(before) and whole.startswith(after) and len(before) < len(after)):
            raise UserError(
                f"{example.where}: the backbone's chat template renders turn {index + 1} differently "
                "once more turns follow, so the answer cannot be told from the prompt; split the "
                "conversation into rows with one assistant turn, or give the tokenizer another template"
            )
        answer = after[len(before) :].rstrip()  # no line end after the turn's end token
        pieces += [(whole[done : len(before)], False), (answer, True)]
        done = len(before) + len(answer)
    # What follows the last answer (a line end, say) is dropped: the example ends with its end token.
    return [piece for piece in pieces if piece[0]]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], where: str, *, ask: bool = False
) -> str:
    """The text of a conversation by the chat template, which transformers runs in jinja's sandbox.

    Args:
        where: the place of the conversation, for the message.
        ask: end with the beginning of an assistant's turn.

    Raises:
        UserError: the template refuses the conversation or fails.
    """
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask))
    except Exception as error:  # a template is a program, whatever it does wrong
        reason = shown(first_line(error), 200)
        raise UserError(
            f"{where}: the backbone's chat template refuses this conversation: {reason}"
        ) from error


def inner_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text that brings its own special tokens, or goes on from another."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def plain_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text that goes on: with the tokenizer's own start token, if any, and no end token."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _ends_turn(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    """Whether the last token ends a turn: eos, or a template's own end (Gemma's `<end_of_turn>`)."""
    if not ids:
        return False
    added = tokenizer.added_tokens_decoder.get(ids[-1])
    return ids[-1] == tokenizer.eos_token_id or (added is not None and added.special)

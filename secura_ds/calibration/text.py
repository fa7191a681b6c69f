"""The text that calibration runs on: written by the frozen model itself, or given (method.md section 7)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from secura_ds.calibration.ranks import broadcast, rank_and_world, turns
from secura_ds.errors import UserError
from secura_ds.files import atomic_write_text
from secura_ds.reading import read_rows, read_text

logger = logging.getLogger(__name__)

SEQUENCE_LENGTH = 160
TOP_P = 0.95
# Fixed, so that a sequence's logits, and so its text, do not depend on the number of ranks.
GENERATION_BATCH = 24

_MARK = "CONTENT"


@dataclass
class Calibration:
    """What calibration made: R (r, in) fp32 on CPU by layer name, and the text behind it.

    `outputs` holds C (out, r) alike, in mode "contrast" only. Of CorDA they are A0 and B0. `token_ids` is
    (sequences, length) int64 on CPU; `texts` is the same, decoded.
    """

    factors: dict[str, Tensor]
    texts: list[str]
    token_ids: Tensor
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the text as JSON lines of `text` and `token_ids`, to be used again as `calibration.text`."""
        rows = zip(self.texts, self.token_ids.tolist(), strict=True)
        lines = [json.dumps({"text": text, "token_ids": ids}, ensure_ascii=False) for text, ids in rows]
        atomic_write_text(Path(path), "\n".join(lines) + "\n")

    @staticmethod
    def load_texts(path: Path) -> list[str]:
        """The texts of a file: each `text` of JSON lines, or a plain file as one text.

        Raises:
            UserError: the file is missing, empty or malformed (names file and line).
        """
        return [text for text, _ in _read(Path(path))]


def read_tokens(path: Path, tokenizer: Any, num_tokens: int) -> Tensor:
    """Token ids (sequences, length) of a text file; one that `Calibration.save` wrote gives its very tokens.

    Other text is joined and cut into sequences of 160 tokens, at most `num_tokens` in all.

    Raises:
        UserError: the file is missing, empty or malformed.
    """
    rows = _read(path)
    saved = [ids for text, ids in rows if ids and max(ids) < len(tokenizer) and tokenizer.decode(ids) == text]
    if len(saved) == len(rows) and len({len(ids) for ids in saved}) == 1:
        return torch.tensor(saved)
    stream = [token for text, _ in rows for token in tokenizer(text)["input_ids"]][:num_tokens]
    if not stream:
        raise UserError(f"{path}: the calibration text has no tokens; give some text or leave it out")
    if len(stream) < num_tokens:
        logger.warning(
            "%s has %d tokens, fewer than calibration.num_tokens %d", path, len(stream), num_tokens
        )
    length = min(SEQUENCE_LENGTH, len(stream))
    return torch.tensor(stream[: len(stream) // length * length]).view(-1, length)


def _read(path: Path) -> list[tuple[str, list[int] | None]]:
    if path.suffix == ".jsonl":
        rows = read_rows(path)
        for where, row in rows:
            if not isinstance(row.get("text"), str):
                raise UserError(f'{where}: the row has no "text"; put the text of each row under that key')
        return [(row["text"], _token_ids(row)) for _, row in rows]
    return [(read_text(path), None)]


def _token_ids(row: Mapping[str, Any]) -> list[int] | None:
    """The tokens that a row of a calibration's own text has beside it; None where it has anything else."""
    ids = row.get("token_ids")
    whole = isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
    return ids if whole else None


def openings(model: Any, tokenizer: Any, count: int) -> list[list[int]]:
    """How each of `count` sequences begins: half with the beginning-of-text token, half with a user's turn.

    Without a chat template all begin with the beginning-of-text token.

    Raises:
        UserError: the tokenizer and the model name no token to begin with.
    """
    config = model.config
    candidates = (tokenizer.bos_token_id, config.bos_token_id, tokenizer.eos_token_id)
    begin = next((token for token in candidates if token is not None), None)
    if begin is None:
        raise UserError(
            "the tokenizer has no beginning- or end-of-text token to start from: give calibration.text"
        )
    if not tokenizer.chat_template:
        return [[begin]] * count
    turn = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    ids = tokenizer(turn.partition(_MARK)[0], add_special_tokens=False)["input_ids"]
    return [[begin]] * (count - count // 2) + [ids or [begin]] * (count // 2)


def generate(model: nn.Module, tokenizer: Any, num_tokens: int, seed: int, progress: bool) -> Tensor:
    """Sequences (num_tokens // 160, 160) sampled from `model` at temperature 1, top-p 0.95, on every rank.

    The end-of-text token does not end a sequence: the model starts another text, as in pre-training.
    """
    length = min(SEQUENCE_LENGTH, num_tokens)
    count = num_tokens // length
    begun = torch.full((count, length), -1)
    for row, opening in zip(begun, openings(model, tokenizer, count), strict=True):
        opening = opening[:length]
        row[: len(opening)] = torch.tensor(opening)
    device = model.device
    batches = list(begun.to(device).split(GENERATION_BATCH))
    share = turns(len(batches))
    rank, world = rank_and_world()
    with tqdm(total=len(share) * length, desc="calibration: text", disable=not progress) as bar:
        for index, counts in share:
            written = _continue(model, batches[index], seed + index, bar)
            if counts:
                batches[index] = written
    for index, batch in enumerate(batches):
        broadcast(batch, index % world)
    return torch.cat(batches).cpu()


def _continue(model: nn.Module, begun: Tensor, seed: int, bar: tqdm) -> Tensor:
    """Fill the entries of `begun` (sequences, length) that are -1, one token of each sequence at a time.

    Openings go through the cache token by token too: every rank runs the same number of forwards.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, cache = begun.clone(), None
    bar.update()
    for step in range(1, tokens.shape[1]):
        output = model(input_ids=tokens[:, step - 1 : step], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        empty = begun[:, step] < 0
        if bool(empty.any()):
            tokens[:, step] = torch.where(empty, sample(output.logits[:, -1], generator), begun[:, step])
        bar.update()
    return tokens


def sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token (n,) per row of `logits` (n, vocabulary), by nucleus sampling without a sort.

    Draws from the whole distribution and draws again where a token lies outside the nucleus: where those more
    likely than it already hold `TOP_P`.
    """
    probabilities = logits.float().softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    tokens = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    open_rows = torch.ones_like(tokens, dtype=torch.bool)
    while bool(open_rows.any()):
        uniform = torch.rand(len(logits), 1, generator=generator).to(logits.device)
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        drawn.clamp_(max=logits.shape[1] - 1)
        likelier = probabilities > probabilities.gather(1, drawn)
        accepted = (probabilities * likelier).sum(dim=-1) < TOP_P
        tokens = torch.where(open_rows & accepted, drawn[:, 0], tokens)
        open_rows &= ~accepted
    return tokens

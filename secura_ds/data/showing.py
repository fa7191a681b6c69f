"""Examples as a person can check them: which tokens there are and which of them are learnt."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from secura_ds.data.encoding import IGNORED

_PART_OF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"


def show_examples(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, n: int) -> str:
    """The first `n` rows: a line per run of tokens, marked `learnt` or `prompt`, tokens parted by `|`.

    Tokens that only together make a character stand together.
    """
    shown = []
    for number, row in enumerate(dataset.select(range(min(n, len(dataset)))), start=1):
        pairs = list(zip(row["input_ids"], row["labels"], strict=True))
        learnt = sum(label != IGNORED for _, label in pairs)
        lines = [f"example {number}: {len(pairs)} tokens, {learnt} learnt"]
        for is_learnt, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
            texts = _texts(tokenizer, [token for token, _ in run])
            text = "|".join(text.replace("\n", "\\n") for text in texts)
            lines.append(f"  {'learnt' if is_learnt else 'prompt'}  {text}")
        shown.append("\n".join(lines))
    return "\n\n".join(shown)


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[str]:
    texts: list[str] = []
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending)
        if not text.endswith(_PART_OF_A_CHARACTER):
            texts.append(text)
            pending = []
    return [*texts, tokenizer.decode(pending)] if pending else texts

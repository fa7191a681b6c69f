"""Examples as a person can check them: which tokens there are and which of them are learnt."""

from __future__ import annotations

from itertools import groupby

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from secura_ds.data.encoding import IGNORED


def show_examples(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, n: int) -> str:
    """The first `n` rows: a line per run of tokens, marked `learnt` or `prompt`, tokens parted by `|`."""
    shown = []
    for number, row in enumerate(dataset.select(range(min(n, len(dataset)))), start=1):
        pairs = list(zip(row["input_ids"], row["labels"], strict=True))
        learnt = sum(label != IGNORED for _, label in pairs)
        lines = [f"example {number}: {len(pairs)} tokens, {learnt} learnt"]
        for is_learnt, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
            tokens = [tokenizer.decode([token]) for token, _ in run]
            text = "|".join(token.replace("\n", "\\n") for token in tokens)
            lines.append(f"  {'learnt' if is_learnt else 'prompt'}  {text}")
        shown.append("\n".join(lines))
    return "\n\n".join(shown)

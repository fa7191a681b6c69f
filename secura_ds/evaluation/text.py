"""Mean token loss on general text: what fine-tuning does to the model's English as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secura_ds.errors import UserError
from secura_ds.evaluation.batching import batches, check_enough
from secura_ds.evaluation.metrics import bootstrap_stderr
from secura_ds.reading import read_text

WINDOW = 256
"""Tokens of a window. Scores of texts are comparable only for one tokenizer and one window."""
TOKENS_PER_BATCH = 1024
"""Bounds the memory of the logits, which are tokens x vocabulary."""


def text_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    max_items: int | None,
    batch_size: int,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Mean loss in nats of the tokens of a plain text, in windows of `WINDOW` tokens that do not overlap.

    A window's first token has nothing before it and is not scored; the tokens after the last whole window are
    left out, unless the text is shorter than one. `n` counts windows, of which `max_items` are used.

    Raises:
        UserError: the file is missing, empty, or not UTF-8.
    """
    windows = read_windows(tokenizer, path, max_items)
    losses = np.zeros(len(windows))
    size = min(batch_size, max(1, TOKENS_PER_BATCH // WINDOW))
    for batch in batches(windows, size, len, path.stem, progress=progress):
        ids = torch.tensor([windows[i] for i in batch], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        for i, row, row_logits in zip(batch, ids, logits, strict=True):
            losses[i] = float(torch.nn.functional.cross_entropy(row_logits[:-1].float(), row[1:]))
    return {
        "mean_token_loss": float(losses.mean()),
        "stderr": bootstrap_stderr(losses),
        "n": len(windows),
        "window": len(windows[0]),
        "items": losses.tolist(),
    }


def read_windows(
    tokenizer: PreTrainedTokenizerBase, path: Path, max_items: int | None = None
) -> list[list[int]]:
    """The text's tokens in windows of equal length.

    Raises:
        UserError: the file is missing, shorter than asked for, or not UTF-8.
    """
    ids: list[int] = tokenizer(read_text(path), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise UserError(f"{path}: the text has {len(ids)} tokens, at least 2 are needed")
    width = min(WINDOW, len(ids))
    windows = [ids[start : start + width] for start in range(0, len(ids) - width + 1, width)]
    check_enough(path, len(windows), f"windows of {width} tokens", max_items)
    return windows[:max_items]

"""Where CorDA starts: the components of each weight that a text excites least, or most (arXiv 2406.05223)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn
from tqdm import tqdm

from secura_ds.adapter.config import by_layer
from secura_ds.adapter.corda import Start, scaling
from secura_ds.calibration.factors import frozen, linear_targets
from secura_ds.calibration.ranks import broadcast, rank_and_world
from secura_ds.calibration.text import Calibration, generate, read_tokens
from secura_ds.errors import UserError


def corda_starts(
    model: Any,
    tokenizer: Any,
    config: LoraConfig,
    *,
    text: Path | None = None,
    num_tokens: int,
    seed: int,
    progress: bool = True,
) -> Calibration:
    """A0 (r, in) and B0 (out, r) of every layer that `config` targets, as `factors` and `outputs`.

    PEFT's own decomposition, of W S with S the second moment of the layer's input. It holds S of every layer
    together. Works on whole weights; collective, all ranks get the same.

    Args:
        text: the text to look at; None lets the model write `num_tokens` tokens, seeded.

    Raises:
        UserError: nothing is targeted, a rank is too large for a layer, the text cannot be used, or what it
            makes of a layer's input cannot be decomposed.
    """
    layers = linear_targets(model, config)
    _check_ranks(layers, config)
    show = progress and rank_and_world()[0] == 0
    with frozen(model):
        if text is not None:
            token_ids = read_tokens(text, tokenizer, num_tokens)
        else:
            token_ids = generate(model, tokenizer, num_tokens, seed, show)
        try:
            preprocess_corda(model, config, run_model=lambda: _run(model, token_ids, show))
        except (ValueError, torch.linalg.LinAlgError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the inputs of the adapted layers cannot be decomposed ({reason}): give adapter.calibration "
                "more or other text"
            ) from error
    starts = {name: _start(layer, scaling(config, name)) for name, layer in layers.items()}
    texts = [tokenizer.decode(row) for row in token_ids.tolist()]
    factors = {name: start.A for name, start in starts.items()}
    return Calibration(factors, texts, token_ids, {name: start.B for name, start in starts.items()})


def _check_ranks(layers: Mapping[str, nn.Linear], config: LoraConfig) -> None:
    for name, layer in layers.items():
        rank, shape = by_layer(config.rank_pattern, name, config.r), tuple(layer.weight.shape)
        if rank > min(shape):
            raise UserError(
                f"adapter.rank is {rank}, but {name} is {shape}: at most {min(shape)} of its components can "
                "be trained; lower it"
            )


def _run(model: Any, token_ids: Tensor, show: bool) -> None:
    """One sequence at a time, as PEFT's hooks take them."""
    for row in tqdm(token_ids.to(model.device), desc="calibration: CorDA", disable=not show):
        model.base_model(input_ids=row.unsqueeze(0), use_cache=False)


def _start(layer: Any, scale: float) -> Start:
    """A0 and B0 with s B0 A0 = U diag(S) V^T, equal on every rank; takes PEFT's note away."""
    eigens = layer.eigens
    del layer.eigens
    root = (eigens.S_WC / scale).sqrt()
    A, B = (eigens.V_WC * root).T.contiguous(), (eigens.U_WC * root).contiguous()
    broadcast(A, 0)
    broadcast(B, 0)
    return Start(A.cpu(), B.cpu())

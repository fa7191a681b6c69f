"""C, R, A and the chosen rows and columns of one layer (method.md sections 1, 2 and 7)."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from secura_ds import sharding
from secura_ds.adapter.config import SecuraConfig
from secura_ds.errors import UserError
from secura_ds.method import cabr, cur


class Factors(NamedTuple):
    """C (out, r) and R (r, in) in the layer's compute dtype, A (r, m) in fp32, row and column indices (r,).

    The row indices are -1 where R is not made of rows of W. Where C is not made of columns of W, `sample`
    (out, 1) is the first of the columns, by which a saved adapter knows its weight again.
    """

    C: Tensor
    R: Tensor
    A: Tensor
    rows: Tensor
    columns: Tensor
    sample: Tensor | None = None


def choose_factors(
    base: nn.Module, layer_name: str, cur_rank: int, inner_rank: int, config: SecuraConfig
) -> Factors:
    """Choose the factors of one layer. A sharded weight is whole only inside this call.

    Raises:
        UserError: names the layer: a rank too large, no calibrated factor, or factors that cannot learn.
    """
    check_ranks(base, layer_name, cur_rank, inner_rank, config)
    weight = sharding.dequantized(base)
    try:
        if config.contrasts:  # neither is made of W; the largest column tells best which W it was
            columns = torch.argsort(cur.squared_norms(weight)[1], descending=True, stable=True)
            columns = columns[:cur_rank].clone()
            rows = columns
        elif config.selection == "sampled":
            rows, columns = cur.sampled(weight, cur_rank, seed=config.seed)
        else:
            rows, columns = cur.least_important(weight, cur_rank)
        if config.init == "identity":
            A = torch.eye(cur_rank, device=weight.device)
        else:
            init = cast(cabr.Init, config.init)
            A = cabr.initial_a(weight, cur_rank, inner_rank, init, seed=config.seed).float()
    except ValueError as error:
        raise UserError(f"{layer_name}: {error}") from error
    if config.selection == "calibrated":
        R, rows = _calibrated(base, layer_name, cur_rank, config).to(weight), torch.full_like(rows, -1)
    else:
        R = weight[rows].clone()
    C = weight[:, columns].contiguous()
    if config.contrasts:
        return Factors(_output(base, layer_name, cur_rank).to(weight), R, A, rows, columns, C[:, :1].clone())
    return Factors(C, R, A, rows, columns)


def _output(base: nn.Module, layer_name: str, cur_rank: int) -> Tensor:
    factor = getattr(base, "secura_output", None)
    if factor is None or tuple(factor.shape) != (base.out_features, cur_rank):
        raise UserError(
            f"calibration.mode is 'contrast', but {layer_name} was not calibrated with it: call "
            "secura_ds.calibrate(model, tokenizer, config, examples=...) with the same configuration"
        )
    return factor.detach()


def _calibrated(base: nn.Module, layer_name: str, cur_rank: int, config: SecuraConfig) -> Tensor:
    factor = getattr(base, "secura_factor", None)
    if factor is None:
        raise UserError(
            f"selection is 'calibrated', but {layer_name} has no calibrated factor: call "
            "secura_ds.calibrate(model, tokenizer, config) before creating the adapter"
        )
    if not config.contrasts and hasattr(base, "secura_output"):
        raise UserError(
            f"calibration.mode is {config.calibration['mode']!r}, but {layer_name} was calibrated for "
            "'contrast': calibrate with the same configuration"
        )
    if tuple(factor.shape) != (cur_rank, base.in_features):
        raise UserError(
            f"{layer_name} was calibrated to a factor of shape {tuple(factor.shape)}, but cur_rank and the "
            f"layer want {(cur_rank, base.in_features)}: calibrate with the same configuration"
        )
    return factor.detach()


def empty_factors(
    base: nn.Module, layer_name: str, cur_rank: int, inner_rank: int, config: SecuraConfig
) -> Factors:
    """Zeros in the shapes of the factors, for saved ones to be loaded into. Reads no weight."""
    check_ranks(base, layer_name, cur_rank, inner_rank, config)
    dtype, device = sharding.compute_dtype(base), base.weight.device
    indices = torch.full((cur_rank,), -1, dtype=torch.int64, device=device)
    identity = config.init == "identity"
    return Factors(
        torch.zeros(base.out_features, cur_rank, dtype=dtype, device=device),
        torch.zeros(cur_rank, base.in_features, dtype=dtype, device=device),
        torch.eye(cur_rank, device=device) if identity else torch.zeros(cur_rank, inner_rank, device=device),
        indices,
        indices.clone(),
        torch.zeros(base.out_features, 1, dtype=dtype, device=device) if config.contrasts else None,
    )


def check_ranks(
    base: nn.Module, layer_name: str, cur_rank: int, inner_rank: int, config: SecuraConfig
) -> None:
    """Raise a UserError that names the layer, the value and the bound if a rank is too large for it."""
    shape = (base.out_features, base.in_features)
    if cur_rank > min(shape):
        raise UserError(
            f"cur_rank is {cur_rank}, but {layer_name} is {shape}: at most {min(shape)}; lower it, or set "
            "rank_pattern for this layer"
        )
    if config.init == "block" and inner_rank > base.in_features:
        raise UserError(
            f"inner_rank is {inner_rank}, but {layer_name} is {shape}: at most {base.in_features} for init "
            "'block'; lower it, set inner_rank_pattern for this layer, or use init 'orthonormal'"
        )

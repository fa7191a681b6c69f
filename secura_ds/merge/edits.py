"""What an adapter does to each tensor of its base: one function per touched tensor.

An edit takes the base tensor, which it overwrites, and returns the merged one in the same dtype and shape, so
that a merge holds one tensor, at most 128 MiB of its update, and a few row blocks.
W (out, in), C (out, r), R (r, in), A (r, m), B (m, r), U (r, r); for LoRA A (r, in), B (out, r).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secura_ds.adapter.config import SecuraConfig, by_layer
from secura_ds.checkpoint_files import Checkpoint, StoredTensor
from secura_ds.errors import UserError
from secura_ds.merge.adapter_file import AdapterFile, Parts
from secura_ds.merge.quantization import Quantization
from secura_ds.method import cabr
from secura_ds.reused_memory import ReusedMemory
from secura_ds.sharding import SliceUpdate, fold_slices

Edit = Callable[[Tensor], Tensor]

# Another device may have quantized a rare tie differently; another model differs all over.
QUANTIZED_TOLERANCE = 0.05
_LOW = {"U_low", "S_low", "V_low"}
_NEEDED = {
    "SECURA": {"A", "B", "C", "R", "U", "columns"},
    "LORA": {"A", "B"},
    "OSF": _LOW | {f"{part}_start" for part in _LOW},
}


def plan_edits(base: Checkpoint, adapter: AdapterFile, onto: str) -> dict[str, Edit]:
    """The edit of every touched base tensor, by tensor name. Reads headers only.

    Args:
        base: the checkpoint to merge into.
        adapter: the adapter's file and settings.
        onto: "trained" replaces 4-bit weights by what training saw, "original" keeps the checkpoint's own;
            "live" edits are given what training holds: dequantized, and with M1's folds in it.

    Raises:
        UserError: adapter and base do not belong together (a module or tensor is missing, a shape differs).
    """
    edits: dict[str, Edit] = {}
    if adapter.quantization is not None and onto != "original":
        for module in adapter.quantized_modules:
            name = _weight_of(base, adapter, module).name
            edits[name] = adapter.quantization.round_trip if onto == "trained" else _keep
    settings = SecuraConfig.from_pretrained(str(adapter.folder)) if adapter.kind == "SECURA" else None
    # A live model leaves less room than a merge has that holds nothing else.
    memory = ReusedMemory() if onto != "live" else None
    for module, parts in adapter.modules.items():
        weight = _weight_of(base, adapter, module)
        _require_parts(base, adapter, module, parts, weight.shape)
        quantization = adapter.quantization if module in adapter.quantized_modules else None
        if settings is not None:
            edits[weight.name] = partial(_secura, settings, parts, quantization, onto, memory)
        elif adapter.kind == "OSF":
            edits[weight.name] = partial(_osf, parts)
        else:
            scaling = _lora_scaling(adapter.config, module, parts["A"].shape[0])
            edits[weight.name] = partial(_lora, scaling, parts, quantization if onto == "trained" else None)
    for name, stored in adapter.replacements.items():
        _require_shape(base, stored, _tensor_of(base, adapter, name).shape)
        edits[name] = partial(_replace, stored)
    return edits


def _tensor_of(base: Checkpoint, adapter: AdapterFile, name: str) -> StoredTensor:
    if name in base.tensors:
        return base.tensors[name]
    trained_on = adapter.config.get("base_model_name_or_path") or "another model"
    raise UserError(
        f"{adapter.folder} changes {name}, which {base.folder} does not hold (another model, or a head tied "
        f"to the embeddings): give the base it was trained on ({trained_on})"
    )


def _weight_of(base: Checkpoint, adapter: AdapterFile, module: str) -> StoredTensor:
    weight = _tensor_of(base, adapter, f"{module}.weight")
    if len(weight.shape) != 2:
        raise UserError(
            f"{weight.file}: {weight.name} is {list(weight.shape)}; only linear layers can be merged"
        )
    return weight


def _require_parts(
    base: Checkpoint, adapter: AdapterFile, module: str, parts: Parts, weight: tuple[int, ...]
) -> None:
    for part in sorted(_NEEDED[adapter.kind] - parts.keys()):
        raise UserError(f"{adapter.folder}: {module} lacks its part {part}; save the adapter again")
    shapes = _shapes(adapter.kind, parts, *weight)
    for part in sorted(parts.keys() & shapes.keys()):
        _require_shape(base, parts[part], shapes[part])


def _shapes(kind: str, parts: Parts, num_rows: int, num_columns: int) -> dict[str, tuple[int, ...]]:
    """What the parts' shapes must be, given the weight's and the ranks."""
    if kind == "OSF":
        rank = math.prod(parts["S_low"].shape)
        low: dict[str, tuple[int, ...]] = {
            "U_low": (num_rows, rank),
            "S_low": (rank,),
            "V_low": (rank, num_columns),
        }
        return low | {f"{part}_start": shape for part, shape in low.items()}
    rank, inner = parts["A"].shape
    if kind == "LORA":
        return {"A": (rank, num_columns), "B": (num_rows, rank), "magnitude_vector": (num_rows,)}
    return {
        "B": (inner, rank),
        "C": (num_rows, rank),
        "R": (rank, num_columns),
        "U": (rank, rank),
        "columns": (rank,),
        "sample": (num_rows, 1),
        "W": (num_rows, num_columns),
    }


def _require_shape(base: Checkpoint, stored: StoredTensor, expected: tuple[int, ...]) -> None:
    if stored.shape != expected:
        raise UserError(
            f"{stored.file}: {stored.name} is {list(stored.shape)}, but the weights of {base.folder} need "
            f"{list(expected)}: give the base this adapter was trained on"
        )


def _keep(weight: Tensor) -> Tensor:
    return weight


def _replace(stored: StoredTensor, weight: Tensor) -> Tensor:
    return _read(stored).to(weight.dtype)


def _read(stored: StoredTensor) -> Tensor:
    tensor = stored.read()
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(
            f"{stored.file}: {stored.name} is not finite; use an earlier checkpoint of the adapter"
        )
    return tensor


def _secura(
    config: SecuraConfig,
    parts: Parts,
    quantization: Quantization | None,
    onto: str,
    memory: ReusedMemory | None,
    W: Tensor,
) -> Tensor:
    """The base weight, its 4-bit image or what M1 folded, plus the restrained update (method.md 3 and 5)."""
    C = _read(parts["C"])
    if onto != "live":
        trained = W
        if quantization is not None:
            trained = quantization.round_trip(W if onto == "trained" else W.clone())
        _require_columns(parts, trained, exact=quantization is None)
        del trained
        if "W" in parts:
            W = _read(parts["W"]).to(W.dtype)
    core = cabr.core(_read(parts["A"]), _read(parts["B"]), _read(parts["U"]))
    update = SliceUpdate(W, C, core, _read(parts["R"]), config.scaling, config.restraint)
    fold_slices([update], memory=memory)
    return W


def _require_columns(parts: Parts, trained: Tensor, *, exact: bool) -> None:
    """C, or a sample in its place, is a piece of the weight that was trained against: is it this one?"""
    stored = parts.get("sample", parts["C"])
    piece = _read(stored)
    indices = _read(parts["columns"])[: piece.shape[1]]
    same = bool((indices >= 0).all() and (indices < trained.shape[1]).all())
    if same:
        columns = trained[:, indices]
        if exact:
            # Training may have held a 32-bit base in 16 bits, and PEFT stores 16-bit buffers in 32.
            dtypes = (piece.dtype, torch.bfloat16, torch.float16)
            same = any(torch.equal(piece, columns.to(dtype).to(piece.dtype)) for dtype in dtypes)
        else:
            gap = torch.linalg.vector_norm(piece.double() - columns.double())
            same = bool(gap <= QUANTIZED_TOLERANCE * torch.linalg.vector_norm(columns.double()))
    if not same:
        raise UserError(
            f"{stored.file}: {stored.name} is not a piece of the base's weight, so the adapter was "
            "trained on other weights of the same shape: give the base it was trained on"
        )


def _lora_scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha: float = by_layer(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _lora(scaling: float, parts: Parts, quantization: Quantization | None, W: Tensor) -> Tensor:
    """W + s B A; for DoRA (arXiv 2402.09353, eq. 5) each row then takes its trained magnitude."""
    if quantization is not None:
        W = quantization.round_trip(W)
    A, B = _read(parts["A"]).float(), _read(parts["B"]).float()
    magnitude = _read(parts["magnitude_vector"]).float() if "magnitude_vector" in parts else None
    for rows in cabr.row_blocks(*W.shape):
        merged = (B[rows] @ A).mul_(scaling).add_(W[rows])
        if magnitude is not None:
            merged *= (magnitude[rows] / torch.linalg.vector_norm(merged, dim=1)).unsqueeze(1)
        W[rows] = merged
    return W


def _osf(parts: Parts, W: Tensor) -> Tensor:
    """W + U S V - U0 S0 V0: the lesser singular directions as trained in place of those that W had."""
    U, S, V = (_read(parts[part]).float() for part in ("U_low", "S_low", "V_low"))
    U0, S0, V0 = (_read(parts[f"{part}_start"]).float() for part in ("U_low", "S_low", "V_low"))
    right = torch.cat([V, V0])
    for rows in cabr.row_blocks(*W.shape):
        left = torch.cat([U[rows] * S, -(U0[rows] * S0)], dim=1)
        W[rows] = (left @ right).add_(W[rows])
    return W

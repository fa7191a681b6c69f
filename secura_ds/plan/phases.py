"""The most that a process holds outside the forward and backward pass: loading, calibrating, stepping."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedConfig

from secura_ds.adapter import secura_layers
from secura_ds.backbones.head import chunk_bytes
from secura_ds.calibration.factors import MEMORY_LIMIT
from secura_ds.calibration.moments import FORWARD_BATCH, moment_bytes
from secura_ds.calibration.text import GENERATION_BATCH, SEQUENCE_LENGTH
from secura_ds.plan.disk import backbone_elements, backbone_parameters, count, trained_bytes
from secura_ds.plan.parts import FP32, AtRest
from secura_ds.plan.settings import Zero
from secura_ds.recipe import CabrSettings, CordaAdapter, FullTraining, Recipe

FP64 = 8
PROCESS = int(1.5 * 2**30)  # main memory of a process before it holds a tensor: Python, PyTorch, CUDA's part
SAMPLING = 21  # bytes per entry of the vocabulary while a token is drawn: fp32 and fp64 copies, and a mask
SOLVING = 5  # fp32 matrices (in, in) that an eigen-decomposition holds: input, vectors, workspace, a copy
SOLVING_ROWS = 8  # fp64 matrices (tokens, tokens) that contrast of rows holds: products, factors, workspace
SAME_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


class Kept(NamedTuple):
    """A second moment (width, width): its products, or `rows` vectors where they are kept in their place."""

    width: int
    rows: int = 0

    @property
    def measured(self) -> int:
        """Bytes while text runs."""
        return moment_bytes(self.width, self.rows, keep_rows=self.rows > 0)

    @property
    def solved(self) -> int:
        """Bytes of what is decomposed, with its eigenvectors."""
        return FP32 * self.rows * self.width if self.rows else 2 * FP32 * self.width**2

    @property
    def solving(self) -> int:
        """Bytes that its decomposition takes beside that."""
        if self.rows:
            return 2 * FP64 * self.rows * self.width + SOLVING_ROWS * FP64 * self.rows**2
        return SOLVING * FP32 * self.width**2


class Subject(NamedTuple):
    """What a phase is planned for."""

    recipe: Recipe
    config: PreTrainedConfig
    model: nn.Module
    rest: AtRest
    zero: Zero
    ranks: int
    device: str


def loading(subject: Subject) -> int:
    """The device while weights load: what stays, and the tensor at hand (under ZeRO-3 its slice is cut)."""
    return _backbone(subject) + _largest(subject)


def calibrating(subject: Subject) -> int:
    """The device while a method looks at activations; 0 where the recipe calls for none."""
    adapter = subject.recipe.adapter
    if isinstance(adapter, CordaAdapter):
        writing = 0 if adapter.calibration.text else _writing(subject)
        return _backbone(subject) + max(writing, _decomposing(subject))
    if not isinstance(adapter, CabrSettings) or adapter.selection != "calibrated":
        return 0
    writing = 0 if adapter.calibration.text else _writing(subject)
    measuring = _differentiating(subject) if adapter.contrasts else _measuring(subject)
    return _backbone(subject) + max(writing, measuring, _solving(subject))


def stepping(subject: Subject) -> int:
    """The device in the optimizer's step: fp32 gradients and what AdamW makes of them."""
    rest, zero = subject.rest, subject.zero
    at_once = rest.slices
    if zero.stage == 0:
        trained = [p.numel() for p in subject.model.parameters() if p.requires_grad]
        # On a GPU AdamW works on all parameters together, on a CPU one after the other.
        at_once = sum(trained) if subject.device == "cuda" else max(trained)
        gradients = 0 if subject.rest.device["gradients"] else sum(trained) * FP32
    elif zero.stage == 3:
        # One sub-group after the other: its gradients in one piece, and widened.
        at_once = min(rest.slices, zero.sub_group)
        gradients = at_once * (FP32 + _itemsize(subject))
    else:
        gradients = rest.slices * FP32 + trained_bytes(subject.model)
    return sum(rest.device.values()) + gradients + 2 * at_once * FP32


def host(subject: Subject, per_node: int, offloaded: int) -> dict[str, int]:
    """Main memory of a node by use, all its processes together, beside what CPU ranks hold as devices."""
    if subject.device == "cuda":
        load = _largest(subject)
        if subject.zero.stage != 3 and subject.recipe.backbone.quantization is None:
            load = backbone_elements(subject.model) * _itemsize(subject)  # loaded whole, then moved
    else:
        load = 0
    adapter = subject.recipe.adapter
    contrasts = isinstance(adapter, CabrSettings) and adapter.contrasts
    walked = _block_inputs(subject) if subject.device == "cuda" and contrasts else 0
    return {
        "processes": PROCESS * per_node,
        "calibration": walked * per_node,
        "loading": load * per_node,
        "offloaded_weights": subject.rest.host.get("frozen_weights", 0) * per_node,
        "optimizer": sum(v for k, v in subject.rest.host.items() if k != "frozen_weights") * per_node,
        "offloaded_activations": offloaded * per_node,
    }


def _itemsize(subject: Subject) -> int:
    return int(getattr(torch, subject.recipe.backbone.dtype).itemsize)


def _backbone(subject: Subject) -> int:
    """What the device holds of the backbone before there is an adapter."""
    parts = ["frozen_weights", "quantization_constants", "model_buffers"]
    if isinstance(subject.recipe.adapter, FullTraining):
        parts.append("adapter_weights")
    return sum(subject.rest.device[part] for part in parts)


def _largest(subject: Subject) -> int:
    """Bytes of the largest weight of the backbone, before it is packed."""
    return max(count(p) for p in backbone_parameters(subject.model)) * _itemsize(subject)


def _writing(subject: Subject) -> int:
    """Writing text token by token: the cache, a draw from the vocabulary, and weights that stay whole."""
    config = subject.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    itemsize = _itemsize(subject)
    tokens = GENERATION_BATCH * SEQUENCE_LENGTH
    # The cache grows by copying a layer's part at a time.
    cache = 2 * tokens * heads * width * itemsize * (config.num_hidden_layers + 1)
    drawing = GENERATION_BATCH * config.vocab_size * (itemsize + SAMPLING)
    return cache + drawing + _whole(subject, keep=MEMORY_LIMIT)


def _measuring(subject: Subject) -> int:
    """Second moments of layers' inputs, and a pass of the text through one layer without gradients."""
    groups = _moments(subject)
    config = subject.config.get_text_config()
    tokens = FORWARD_BATCH * min(SEQUENCE_LENGTH, config.max_position_embeddings)
    passing = tokens * (4 * config.hidden_size + 3 * config.intermediate_size) * _itemsize(subject)
    widened = FP32 * tokens * _widest(groups)
    return _held(groups) + passing + widened + _whole(subject, keep=0)


def _differentiating(subject: Subject) -> int:
    """Moments, one block with what its backward keeps, and the gradients of all batches."""
    groups = _moments(subject)
    config = subject.config.get_text_config()
    tokens = max(_batch_tokens(subject))
    # By a block's output and by its input; on CPUs every block's input is there, too.
    kept = 2 * _walked_tokens(subject) * config.hidden_size * _itemsize(subject)
    if subject.device == "cpu":
        kept += _block_inputs(subject)
    passing = tokens * (16 * config.hidden_size + 8 * config.intermediate_size) * _itemsize(subject)
    loss = chunk_bytes(tokens, config.vocab_size, _itemsize(subject), softcap=_softcap(config))
    widened = FP32 * tokens * _widest(groups)
    return _held(groups) + kept + max(passing + widened, loss) + _whole_block(subject)


def _batch_tokens(subject: Subject) -> tuple[int, int]:
    """Tokens of a batch of text and of one of examples, each as long as it may be."""
    longest = subject.config.get_text_config().max_position_embeddings
    lengths = SEQUENCE_LENGTH, max(SEQUENCE_LENGTH, subject.recipe.data.max_length)
    return FORWARD_BATCH * min(lengths[0], longest), FORWARD_BATCH * min(lengths[1], longest)


def _walked_tokens(subject: Subject) -> int:
    """Tokens of text and of examples that contrast takes through the model on one rank, in whole batches."""
    assert isinstance(subject.recipe.adapter, CabrSettings)
    looked_at = subject.recipe.adapter.calibration.num_tokens
    return sum(math.ceil(looked_at / (tokens * subject.ranks)) * tokens for tokens in _batch_tokens(subject))


def _block_inputs(subject: Subject) -> int:
    """Bytes of every block's input, which wait in main memory for the way back."""
    config = subject.config.get_text_config()
    return _walked_tokens(subject) * config.hidden_size * config.num_hidden_layers * _itemsize(subject)


def _softcap(config: PreTrainedConfig) -> bool:
    return getattr(config, "final_logit_softcapping", None) is not None


def _whole_block(subject: Subject) -> int:
    """What is whole at a time beside what stays: under ZeRO-3 a block's weights, or the head's."""
    if subject.zero.stage != 3 or subject.ranks == 1:
        return _whole(subject, keep=0)
    blocks: dict[str, int] = {}
    for name, p in subject.model.named_parameters():
        block = re.match(r".*\.layers\.\d+\.", name)
        if not p.requires_grad:
            own = block[0] if block else name
            blocks[own] = blocks.get(own, 0) + p.nbytes
    return _whole(subject, keep=0) + max(blocks.values())


def _held(groups: Sequence[Sequence[Kept]]) -> int:
    """Bytes of the moments of the largest run over the text."""
    return max(sum(kept.measured for group in run for kept in group) for run in _runs(groups))


def _widest(groups: Sequence[Sequence[Kept]]) -> int:
    return max(kept.width for group in groups for kept in group)


def _solving(subject: Subject) -> int:
    """A rank's share of a run's moments with their eigenvectors, one decomposition at a time, one weight."""
    groups = _moments(subject)
    shares = [sorted(run, key=max, reverse=True)[: -(-len(run) // subject.ranks)] for run in _runs(groups)]
    pairs = max(sum(kept.solved for group in share for kept in group) for share in shares)
    solving = max(kept.solving for group in groups for kept in group)
    weight = max(layer.out_features * layer.in_features for layer in secura_layers(subject.model).values())
    return pairs + solving + weight * _itemsize(subject)


def _decomposing(subject: Subject) -> int:
    """PEFT's CorDA: all moments, all singular vectors in main memory, one decomposition at a time."""
    shapes = [
        (layer.out_features, layer.in_features)
        for layer in subject.model.modules()
        if isinstance(layer, LoraLayer)
    ]
    moments = sum(FP32 * width**2 for _, width in shapes)
    vectors = sum(FP32 * min(shape) * sum(shape) for shape in shapes) if subject.device == "cpu" else 0
    solving = max(SOLVING * FP32 * width**2 + 3 * FP32 * height * width for height, width in shapes)
    return moments + vectors + solving


def _runs(groups: Sequence[Sequence[Kept]]) -> list[list[Sequence[Kept]]]:
    """Moments that are taken in one pass over the text, as calibration cuts them to its limit."""
    runs: list[list[Sequence[Kept]]] = [[]]
    held = 0
    for group in groups:
        size = sum(kept.measured for kept in group)
        if runs[-1] and held + size > MEMORY_LIMIT:
            runs.append([])
            held = 0
        runs[-1].append(group)
        held += size
    return runs


def _whole(subject: Subject, *, keep: int) -> int:
    """Weights that are whole at a time beside what stays: the largest, and `keep` bytes of others."""
    frozen = [p for p in subject.model.parameters() if not p.requires_grad]
    packed = [count(p) for p in frozen if getattr(p, "quant_state", None) is not None]
    unpacked = max(packed, default=0) * _itemsize(subject)
    if subject.zero.stage != 3 or subject.ranks == 1:
        return unpacked
    largest = max(p.nbytes for p in frozen)
    return unpacked + largest + min(keep, subject.rest.device["frozen_weights"] * subject.ranks)


def _moments(subject: Subject) -> list[list[Kept]]:
    """Moments of each distinct input of adapted layers; for contrast two of each, and of outputs, too."""
    adapter = subject.recipe.adapter
    contrasts, tokens = False, 0
    if isinstance(adapter, CabrSettings) and adapter.contrasts:
        contrasts = True
        # Whole sequences of text, and whole examples.
        tokens = adapter.calibration.num_tokens + max(SEQUENCE_LENGTH, subject.recipe.data.max_length)
    seen: dict[tuple[str, frozenset[str]], list[int]] = {}
    for name, layer in secura_layers(subject.model).items():
        parent, _, own = name.rpartition(".")
        group = next((frozenset(names) for names in SAME_INPUT if own in names), frozenset({own}))
        widths = seen.setdefault((parent, group), [layer.in_features])
        if contrasts:
            widths.append(layer.out_features)

    def kept(width: int) -> Kept:
        return Kept(width, tokens if contrasts and 2 * tokens <= width else 0)

    return [[kept(width) for width in (2 * widths if contrasts else widths)] for widths in seen.values()]

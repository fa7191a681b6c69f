"""`calibrate`: from a frozen model to the factors of each layer to be adapted (method.md section 7)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import Tensor, nn
from tqdm import tqdm

from secura_ds import sharding
from secura_ds.adapter.config import SecuraConfig, by_layer
from secura_ds.adapter.factors import check_ranks
from secura_ds.adapter.model import SecuraModel
from secura_ds.calibration.contrast import contrast_factors
from secura_ds.calibration.moments import (
    FORWARD_BATCH,
    InputGroup,
    input_groups,
    owners,
    second_moments,
    within_memory,
)
from secura_ds.calibration.ranks import broadcast, raise_together, rank_and_world, turns
from secura_ds.calibration.sensitivity import example_batches, text_batches
from secura_ds.calibration.text import Calibration, generate, read_tokens
from secura_ds.calibration.walk import Batch, block_numbers, decoder_blocks
from secura_ds.errors import UserError
from secura_ds.method import calibrated

MEMORY_LIMIT = 2 * 2**30


def calibrate(
    model: Any,
    tokenizer: Any,
    config: SecuraConfig,
    *,
    text_path: Path | None = None,
    examples: Sequence[Mapping[str, Any]] | None = None,
    earlier: Sequence[Mapping[str, Any]] | None = None,
    progress: bool = True,
    memory_limit: int = MEMORY_LIMIT,
) -> Calibration:
    """Compute R, and C in mode "contrast", of every layer that `config` targets, for the adapter to find.

    What an earlier call has left on the model is forgotten.
    Works on plain, 4-bit and ZeRO-3 partitioned models, before adapters are put in. Collective: every rank
    calls it, they share the work, and all get the same factors.

    Args:
        model: a transformers causal language model.
        text_path: text to calibrate on (JSON lines or plain) instead of `config.calibration["text"]`; with
            neither the model writes it.
        examples: rows of `input_ids` and `labels`, as training takes them, for mode "contrast": the first
            `config.calibration["num_tokens"]` tokens of them are looked at.
        earlier: rows of tasks learnt before; in mode "contrast" they count as much as the text.
        progress: show progress bars, on rank 0.
        memory_limit: bytes that second moments may take, with more passes over the text to keep to it, and
            bytes of a sharded model's weights that stay whole while it writes the text.

    Raises:
        UserError: nothing is targeted, a rank is too large for a layer, a layer's inputs are zero
            or not finite, the given text cannot be used, or mode "contrast" has no examples. The message
            names the layer or file.
    """
    if config.selection != "calibrated":
        raise UserError(
            f"selection is {config.selection!r}, which needs no calibration: set it to 'calibrated'"
        )
    layers = target_layers(model, config)
    drop_factors(model)
    settings = config.calibration
    contrasts = settings["mode"] == "contrast"
    task = _task(model, layers, examples, settings["num_tokens"]) if contrasts else []
    before = _on(model, example_batches(earlier)) if contrasts and earlier is not None else []
    source = text_path or settings["text"]
    sharding.keep_exact(model)
    show = progress and rank_and_world()[0] == 0
    factors: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with frozen(model), sharding.gathered_forward(model, keep_bytes=memory_limit):
        if source is not None:
            token_ids = read_tokens(Path(source), tokenizer, settings["num_tokens"])
        else:
            token_ids = generate(model, tokenizer, settings["num_tokens"], settings["seed"], show)
    # Passes over the text are few: nothing stays whole between them, nor while factors are computed.
    with frozen(model), sharding.gathered_forward(model):
        body, ids = _body(model, layers), token_ids.to(model.device)
        groups = input_groups(body, layers, ids)
    if contrasts:
        with frozen(model):
            factors, outputs = contrast_factors(
                model,
                layers,
                groups,
                text_batches(ids),
                task,
                config,
                earlier=before,
                memory_limit=memory_limit,
                show=show,
            )
    else:
        with frozen(model), sharding.gathered_forward(model):
            factors = _input_factors(body, layers, groups, ids, config, memory_limit, show)
    texts = [tokenizer.decode(row) for row in token_ids.tolist()]
    made = Calibration({name: factors[name] for name in layers}, texts, token_ids, outputs)
    put_factors(layers, made)
    return made


def put_factors(layers: Mapping[str, nn.Linear], calibration: Calibration) -> None:
    """Leave what calibration made where an adapter on these layers finds it."""
    for name, R in calibration.factors.items():
        layers[name].secura_factor = R
    for name, C in calibration.outputs.items():
        layers[name].secura_output = C


def drop_factors(model: nn.Module) -> None:
    """Forget what calibration left, once the adapter has it: engines may hold the layers for ever."""
    for module in model.modules():
        for name in ("secura_factor", "secura_output"):
            if hasattr(module, name):
                delattr(module, name)


def _task(
    model: Any,
    layers: Mapping[str, nn.Linear],
    examples: Sequence[Mapping[str, Any]] | None,
    num_tokens: int,
) -> list[Batch]:
    if examples is None:
        raise UserError(
            "calibration.mode is 'contrast', which looks at the task, too: give calibrate the training "
            "examples, or use another mode"
        )
    block_numbers(decoder_blocks(model), layers)
    return _on(model, example_batches(examples, num_tokens))


def _on(model: Any, batches: Sequence[Batch]) -> list[Batch]:
    return [Batch(*(part.to(model.device) for part in batch)) for batch in batches]


def _input_factors(
    body: nn.Module,
    layers: Mapping[str, nn.Linear],
    groups: Sequence[InputGroup],
    ids: Tensor,
    config: SecuraConfig,
    memory_limit: int,
    show: bool,
) -> dict[str, Tensor]:
    """R of every layer from the second moments of inputs alone, on CPU."""
    factors: dict[str, Tensor] = {}
    runs = list(within_memory(groups, memory_limit, lambda group: 8 * group.leader.in_features**2))
    num_forwards = len(turns(len(ids.split(FORWARD_BATCH))))
    total = num_forwards * len(runs) + len(layers)
    with tqdm(total=total, desc="calibration: factors", disable=not show) as bar:
        for run in runs:
            owner = owners(run)
            moments = second_moments(body, run, owner, ids, bar)
            factors |= _solve(layers, run, owner, moments, config, bar)
    return factors


def target_layers(model: Any, config: SecuraConfig) -> dict[str, nn.Linear]:
    """The linear layers that `config` targets in `model`, by name, as PEFT finds them.

    Raises:
        UserError: nothing is targeted, or something that is not linear; a rank is too large for a layer.
    """
    wanted = copy.copy(config)
    if wanted.target_modules is None:
        family = getattr(model.config, "model_type", "unknown")
        wanted.target_modules = SecuraModel.target_module_mapping.get(family)
        if wanted.target_modules is None:
            raise UserError(f"model type {family!r} has no default target_modules: set target_modules")
    layers = linear_targets(model, wanted)
    for name, layer in layers.items():
        inner_rank = by_layer(config.inner_rank_pattern, name, config.inner_rank)
        check_ranks(layer, name, _rank(config, name), inner_rank, config)
    return layers


def linear_targets(model: Any, config: PeftConfig) -> dict[str, nn.Linear]:
    """The layers that a configuration of any PEFT method targets, by name; `all-linear` becomes their names.

    Raises:
        UserError: nothing is targeted, or something that is not linear.
    """
    wanted = _maybe_include_all_linear_layers(config, model)
    layers: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if not check_target_module_exists(wanted, name):
            continue
        if not isinstance(module, nn.Linear):
            raise UserError(
                f"target module {name} is a {type(module).__name__}: only linear layers can be taken"
            )
        layers[name] = module
    if not layers:
        raise UserError(
            f"target_modules {config.target_modules} match no module of the model: correct the names"
        )
    return layers


def _rank(config: SecuraConfig, name: str) -> int:
    return by_layer(config.rank_pattern, name, config.cur_rank)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside the block."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _body(model: Any, layers: Mapping[str, nn.Linear]) -> nn.Module:
    """The model without its head, a large product with the vocabulary, unless a layer lies outside."""
    body: nn.Module = model.base_model
    inside = {id(module) for module in body.modules()}
    return body if all(id(layer) in inside for layer in layers.values()) else model


def _solve(
    layers: Mapping[str, nn.Linear],
    groups: Sequence[InputGroup],
    owner: Sequence[int],
    moments: Sequence[Tensor | None],
    config: SecuraConfig,
    bar: tqdm,
) -> dict[str, Tensor]:
    """R of every layer of `groups`, on CPU: computed where the moment lies, then sent to every rank.

    All decompositions come before the first collective, so that the ranks work at the same time.
    """
    mode = config.calibration["mode"]
    problems: list[str] = []
    spectra: list[calibrated.Spectrum | None] = []
    for group, moment in zip(groups, moments, strict=True):
        spectra.append(None)
        if moment is not None and mode != "rows":
            try:
                spectra[-1] = calibrated.decompose(moment)
            except (ValueError, torch.linalg.LinAlgError) as error:
                problems.append(f"{group.names[0]}: {error}")
    raise_together(problems)
    factors: dict[str, Tensor] = {}
    for i, group in enumerate(groups):
        for name in group.names:
            weight = sharding.dequantized(layers[name])
            shape = (_rank(config, name), layers[name].in_features)
            R = torch.zeros(shape, dtype=torch.float32, device=weight.device)
            moment = moments[i]
            if moment is not None:
                try:
                    R = calibrated.factors(
                        weight,
                        moment,
                        shape[0],
                        mode=mode,
                        energy=config.calibration["energy"],
                        spectrum=spectra[i],
                    )
                except ValueError as error:
                    problems.append(f"{name}: {error}")
            broadcast(R, owner[i])
            factors[name] = R.cpu()
            bar.update()
    raise_together(problems)
    return factors

"""The method of a recipe, put onto a loaded backbone: calibration, the adapter, or the weights themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from peft import LoraConfig, OSFConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed

from secura_ds.adapter import SecuraConfig
from secura_ds.adapter.corda import Start, is_corda, keep_starts, offer_starts, read_starts
from secura_ds.adapter.osf import prepare_osf
from secura_ds.backbones.adapter import (
    adapter_config,
    refuse_packed_training,
    refuse_unmatched,
    train_weights,
)
from secura_ds.calibration import (
    Calibration,
    calibrate,
    corda_starts,
    drop_factors,
    put_factors,
    target_layers,
)
from secura_ds.errors import UserError
from secura_ds.ranks import on_main
from secura_ds.recipe import CordaAdapter, FullTraining, Recipe
from secura_ds.training.shared import SharedCalibration

OnCalibration = Callable[[Calibration, float], object]
"""Is given what calibration made, and the seconds that another run has spent on it for this one."""


def put_method(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    autocast: bool,
    on_calibration: OnCalibration | None = None,
    factors: Mapping[str, Tensor] | None = None,
    examples: Sequence[Mapping[str, Any]] | None = None,
    earlier: Sequence[Mapping[str, Any]] | None = None,
    shared: SharedCalibration | None = None,
) -> PeftModel | PreTrainedModel:
    """The model that is trained. Collective where a method calibrates.

    Args:
        autocast: trained parameters of an adapter become fp32 where the backbone is in half precision.
        on_calibration: is given what calibration made, or found in `shared`.
        factors: what an earlier run chose (`frozen_factors`), instead of choosing it anew.
        examples: what is to be learnt, for a calibration that looks at it.
        earlier: what was learnt before and is to be kept, the same.
        shared: where other runs may have left what calibration would make, and find it.

    Raises:
        UserError: anything in `adapter` that does not fit the backbone.
    """
    refuse_unmatched(model, recipe.adapter)
    config = adapter_config(recipe, model.config)
    if config is None:
        assert isinstance(recipe.adapter, FullTraining)
        train_weights(model, recipe.adapter)
        model.enable_input_require_grads()
        return model
    refuse_head(model, config)
    starts: dict[str, Start] = {}
    if factors is not None:
        if isinstance(config, SecuraConfig):
            config.factors_saved = True
        elif is_corda(config):
            starts = read_starts(factors)
    elif _calibrates(config):
        made, spared = _calibrated(model, tokenizer, recipe, config, examples, earlier, shared)
        if is_corda(config):
            starts = {name: Start(A, made.outputs[name]) for name, A in made.factors.items()}
        if on_calibration is not None:
            on_calibration(made, spared)
    if isinstance(config, LoraConfig):
        offer_starts(model, config, starts)
    # The adapter's random numbers must not depend on how many calibration drew.
    set_seed(recipe.training.seed)
    adapted = _put_adapter(model, config, autocast=autocast)
    refuse_packed_training(adapted)
    drop_factors(adapted)
    keep_starts(adapted, starts)
    if isinstance(config, OSFConfig):
        prepare_osf(adapted)
    return adapted


def _calibrates(config: PeftConfig) -> bool:
    """Whether a method looks at text before its adapter is made."""
    return is_corda(config) or (isinstance(config, SecuraConfig) and config.selection == "calibrated")


def _calibrated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    config: PeftConfig,
    examples: Sequence[Mapping[str, Any]] | None,
    earlier: Sequence[Mapping[str, Any]] | None,
    shared: SharedCalibration | None,
) -> tuple[Calibration, float]:
    """What calibration makes, SECURA's left for the adapter to find.

    Returns:
        It, and the seconds that another run has spent on it for this one.
    """
    if shared is not None and shared.exists():
        made, seconds = shared.read(tokenizer)
        if isinstance(config, SecuraConfig):
            put_factors(target_layers(model, config), made)
        return made, seconds
    began = time.perf_counter()
    text = shared.found_text() if shared is not None else None
    if isinstance(config, SecuraConfig):
        made = calibrate(model, tokenizer, config, text_path=text, examples=examples, earlier=earlier)
    else:
        assert isinstance(config, LoraConfig) and isinstance(recipe.adapter, CordaAdapter)
        wanted = recipe.adapter.calibration
        text = recipe.resolve_path(wanted.text) if wanted.text is not None else text
        sizes: Any = {"num_tokens": wanted.num_tokens, "seed": wanted.seed}
        made = corda_starts(model, tokenizer, config, text=text, **sizes)
    if shared is not None:
        on_main(partial(shared.keep, made, time.perf_counter() - began))
    return made, 0.0


def refuse_head(model: PreTrainedModel, config: PeftConfig) -> None:
    """The loss is formed from the head's own weight, so an adapter on the head would never be trained."""
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    if check_target_module_exists(config, name):
        raise UserError(
            f"adapter.target_modules puts an adapter on the head {name}, which training would not reach: "
            f'leave it out, or train the whole head with adapter.modules_to_save=["{name}"]'
        )


def _put_adapter(model: PreTrainedModel, config: PeftConfig, *, autocast: bool) -> PeftModel:
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=autocast)
    except ValueError as error:
        # PEFT's own refusals (no target module matches, an unsupported one) are ValueErrors of several lines.
        raise UserError(f"adapter.target_modules: {' '.join(str(error).split())}") from error
    adapted.enable_input_require_grads()
    return adapted

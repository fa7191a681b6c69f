"""The method of a recipe, put onto a loaded backbone: calibration, the adapter, or the weights themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peft import LoraConfig, OSFConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed

from secura_ds.adapter import SecuraConfig
from secura_ds.adapter.corda import Start, is_corda, keep_starts, offer_starts, read_starts
from secura_ds.adapter.osf import prepare_osf
from secura_ds.backbones.adapter import adapter_config, train_weights
from secura_ds.calibration import Calibration, calibrate, corda_starts
from secura_ds.errors import UserError
from secura_ds.recipe import CordaAdapter, FullTraining, Recipe

OnCalibration = Callable[[Calibration], object]


def put_method(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    autocast: bool,
    on_calibration: OnCalibration | None = None,
    factors: Mapping[str, Tensor] | None = None,
    examples: Sequence[Mapping[str, Any]] | None = None,
) -> PeftModel | PreTrainedModel:
    """The model that is trained. Collective where a method calibrates.

    Args:
        autocast: trained parameters of an adapter become fp32 where the backbone is in half precision.
        on_calibration: is given what calibration made.
        factors: what an earlier run chose (`frozen_factors`), instead of choosing it anew.
        examples: what is to be learnt, for a calibration that looks at it.

    Raises:
        UserError: anything in `adapter` that does not fit the backbone.
    """
    config = adapter_config(recipe, model.config)
    if config is None:
        assert isinstance(recipe.adapter, FullTraining)
        train_weights(model, recipe.adapter)
        model.enable_input_require_grads()
        return model
    refuse_head(model, config)
    starts: dict[str, Start] = {}
    calibration: Calibration | None = None
    if isinstance(config, SecuraConfig):
        calibration = _calibrated(model, tokenizer, config, examples, chosen=factors is not None)
    elif is_corda(config):
        starts, calibration = _corda(model, tokenizer, recipe, config, factors)
    if calibration is not None and on_calibration is not None:
        on_calibration(calibration)
    # The adapter's random numbers must not depend on how many calibration drew.
    set_seed(recipe.training.seed)
    adapted = _put_adapter(model, config, autocast=autocast)
    keep_starts(adapted, starts)
    if isinstance(config, OSFConfig):
        prepare_osf(adapted)
    return adapted


def _calibrated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SecuraConfig,
    examples: Sequence[Mapping[str, Any]] | None,
    *,
    chosen: bool,
) -> Calibration | None:
    if chosen:
        config.factors_saved = True
        return None
    if config.selection != "calibrated":
        return None
    return calibrate(model, tokenizer, config, examples=examples)


def _corda(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    config: LoraConfig,
    factors: Mapping[str, Tensor] | None,
) -> tuple[dict[str, Start], Calibration | None]:
    """Where each layer starts, left for PEFT to find."""
    assert isinstance(recipe.adapter, CordaAdapter)
    wanted = recipe.adapter.calibration
    starts: dict[str, Start]
    calibration: Calibration | None = None
    if factors is not None:
        starts = read_starts(factors)
    else:
        text = recipe.resolve_path(wanted.text) if wanted.text is not None else None
        sizes: Any = {"num_tokens": wanted.num_tokens, "seed": wanted.seed}
        starts, calibration = corda_starts(model, tokenizer, config, text=text, **sizes)
    offer_starts(model, config, starts)
    return starts, calibration


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

"""The part of a recipe that says which adapter is trained, and how."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from secura_ds.errors import shown
from secura_ds.recipe.base import File, Fraction, PositiveFloat, PositiveInt, Section, Seed


def _targets(value: Any) -> Any:
    names = isinstance(value, list) and value and all(isinstance(name, str) for name in value)
    if value is None or value == "all-linear" or names:
        return value
    raise ValueError('should be a list of module names, "all-linear" or null (the family\'s default)')


Targets = Annotated[list[str] | Literal["all-linear"] | None, BeforeValidator(_targets)]


def _patterns(value: dict[str, int]) -> dict[str, int]:
    for name in value:
        try:
            re.compile(name)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"the key {shown(repr(name))} is no module name and no regular expression ({error})"
            ) from error
    return value


Ranks = Annotated[dict[str, PositiveInt], AfterValidator(_patterns)]


class Calibration(Section):
    """How `selection: "calibrated"` finds directions that general inputs do not excite."""

    mode: Literal["null", "rows", "project", "whiten"] = "null"
    """How the factors follow from the second moment of each layer's input."""
    text: File | None = None
    """Own text for calibration, JSONL or plain; null lets the frozen model write it."""
    num_tokens: PositiveInt = 7680
    """Length of the generated text in tokens."""
    energy: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Share of the activations' energy that mode `project` keeps clear of."""
    seed: Seed = 0
    """Seed of the generated text."""


class SMagNorm(Section):
    """The norm that restrains large relative changes of a weight."""

    apply: Literal["forward", "merge", "never"] = "merge"
    """In every forward pass, only when the update is folded or merged, or never."""
    form: Literal["update", "average"] = "update"
    """`W + D / M` or `(2 W + D) / M`."""
    steepness: PositiveFloat = 6.0
    """Slope of the sigmoid."""
    eps: PositiveFloat | None = 1e-10
    """Absolute floor of the weight's magnitude; exactly one of `eps` and `eps_relative` is set."""
    eps_relative: PositiveFloat | None = None
    """The same as a multiple of the weight's mean magnitude."""

    @model_validator(mode="before")
    @classmethod
    def _relative_replaces_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("eps_relative") is not None:
            return {"eps": None, **values}
        return values

    @field_validator("eps_relative")
    @classmethod
    def _exactly_one(cls, value: float | None, info: ValidationInfo) -> float | None:
        if "eps" in info.data and (value is None) == (info.data["eps"] is None):
            raise ValueError(
                "exactly one of eps and eps_relative should be a number, the other null or left out"
            )
        return value


class AdapterTargets(Section):
    """Which modules an adapter of any method is put on."""

    target_modules: Targets = None
    """Names of the adapted modules, `all-linear`, or null for the family's default."""
    exclude_modules: list[str] | None = None
    """Names of modules left out although they match."""
    modules_to_save: list[str] | None = None
    """Modules trained whole and stored with the adapter."""


class SecuraAdapter(AdapterTargets):
    """SECURA: CABR-LoRA under S-MagNorm."""

    method: Literal["secura"] = "secura"
    """The adapter's method."""
    cur_rank: PositiveInt = 64
    """Columns and rows of each weight that the update is built on (r)."""
    inner_rank: PositiveInt = 96
    """Inner dimension of the trained factors (m)."""
    scaling: PositiveFloat = 1.0
    """Factor of the update (s)."""
    selection: Literal["least", "sampled", "calibrated"] = "least"
    """How rows and columns are chosen."""
    init: Literal["block", "orthogonal"] = "block"
    """First value of A."""
    calibration: Calibration = Calibration()
    """Settings of `selection: "calibrated"`."""
    strategy: Literal["M1", "M2"] = "M2"
    """Fold into the weight (M1) or into the frozen core (M2)."""
    fold_every: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Optimizer steps between folds; 0 folds only at the end."""
    smagnorm: SMagNorm = SMagNorm()
    """Settings of S-MagNorm."""
    rank_pattern: Ranks = {}
    """Other values of `cur_rank`, by module name."""
    inner_rank_pattern: Ranks = {}
    """Other values of `inner_rank`, by module name."""


class LoraAdapter(AdapterTargets):
    """LoRA or DoRA of PEFT, for comparison."""

    method: Literal["lora", "dora"]
    """The adapter's method."""
    rank: PositiveInt = 16
    """Rank of the update."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""


Adapter = Annotated[SecuraAdapter | LoraAdapter, Field(discriminator="method")]

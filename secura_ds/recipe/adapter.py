"""The part of a recipe that says which adapter is trained, and how."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from secura_ds.errors import shown
from secura_ds.recipe.base import File, Fraction, PositiveFloat, PositiveInt, Section, Seed


def _targets(value: Any) -> Any:
    names = isinstance(value, list) and value and all(isinstance(name, str) for name in value)
    if value is None or value == "all-linear" or names:
        return value
    raise ValueError('should be a list of module names, "all-linear" or null (the family\'s default)')


TargetModules = Annotated[list[str] | Literal["all-linear"] | None, BeforeValidator(_targets)]


def _preserved(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and (0 < value < 1 or (isinstance(value, int) and 0 < value < 2**31)):
        return value
    raise ValueError("should be a whole number above 0, or a share between 0 and 1")


Preserved = Annotated[int | float, BeforeValidator(_preserved)]


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


class CalibrationText(Section):
    """The text that a method looks at a layer's inputs on."""

    text: File | None = None
    """Own text for calibration, JSONL or plain; null lets the frozen model write it."""
    num_tokens: PositiveInt = 7680
    """Length of the generated text in tokens."""
    seed: Seed = 0
    """Seed of the generated text."""


class Calibration(CalibrationText):
    """How `selection: "calibrated"` finds directions that general inputs do not excite."""

    mode: Literal["null", "rows", "project", "whiten", "contrast"] = "contrast"
    """How the factors follow from second moments: of each layer's input, or in `contrast` of its output's
    gradient as well, and of general text against the task."""
    energy: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Share of the activations' energy that mode `project` keeps clear of."""
    floor: Annotated[float, Field(gt=0, lt=1)] = 0.03
    """What mode `contrast` takes general text to need of every direction, as a share of the mean."""


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
    """Which modules an adapter is put on, and which are trained whole beside it."""

    target_modules: TargetModules = None
    """Names of the adapted modules, `all-linear`, or null for the family's default."""
    exclude_modules: list[str] | None = None
    """Names of modules left out although they match."""
    modules_to_save: list[str] | None = None
    """Modules trained whole and stored with the adapter."""


def _contrasts(given: dict[str, Any]) -> bool:
    """Whether C and R are chosen in mode `contrast`; False while one of the settings is not valid."""
    calibration = given.get("calibration")
    return (
        given.get("selection") == "calibrated" and calibration is not None and calibration.mode == "contrast"
    )


class CabrSettings(AdapterTargets):
    """What SECURA and CABR-LoRA share."""

    cur_rank: PositiveInt = 64
    """Columns and rows of each weight that the update is built on (r)."""
    inner_rank: PositiveInt = 96
    """Inner dimension of the trained factors (m)."""
    scaling: PositiveFloat = 1.0
    """Factor of the update (s)."""
    selection: Literal["least", "sampled", "calibrated"] = "calibrated"
    """How the factors are chosen: by what inputs and gradients say, or the weight's rows and columns of least
    norm (the paper's), or drawn (CURLoRA's)."""
    calibration: Calibration = Calibration()
    """Settings of `selection: "calibrated"`."""
    init: Literal["block", "orthogonal", "orthonormal"] = Field(
        default_factory=lambda given: "orthonormal" if _contrasts(given) else "block"
    )
    """First value of A; by default orthonormal with mode `contrast`, else the paper's block of W."""
    strategy: Literal["M1", "M2"] = "M2"
    """Fold into the weight (M1) or into the frozen core (M2)."""
    fold_every: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Optimizer steps between folds; 0 folds only at the end."""
    rank_pattern: Ranks = {}
    """Other values of `cur_rank`, by module name."""
    inner_rank_pattern: Ranks = {}
    """Other values of `inner_rank`, by module name."""

    @property
    def contrasts(self) -> bool:
        """Whether calibration takes C as well as R, and looks at the task."""
        return _contrasts({"selection": self.selection, "calibration": self.calibration})

    @property
    def renews(self) -> bool:
        """Whether each task of a sequence gets its own factors, as M1 leaves nothing in the last task's."""
        return self.contrasts and self.strategy == "M1"


class SecuraAdapter(CabrSettings):
    """SECURA: CABR-LoRA under S-MagNorm."""

    method: Literal["secura"] = "secura"
    """The adapter's method."""
    smagnorm: SMagNorm = Field(
        default_factory=lambda given: SMagNorm(apply="never" if _contrasts(given) else "merge")
    )
    """Settings of S-MagNorm; left out, it acts in the merge, but with mode `contrast` never."""


class CabrAdapter(CabrSettings):
    """CABR-LoRA: SECURA's update without S-MagNorm, `W + s C (U + A B) R`."""

    method: Literal["cabr"]
    """The adapter's method."""


class CurLoraAdapter(AdapterTargets):
    """CURLoRA (arXiv 2408.14572): `W + s C U R`, of which U is trained, from 0."""

    method: Literal["cur-lora"]
    """The adapter's method."""
    cur_rank: PositiveInt = 64
    """Columns and rows of each weight, drawn with inverted probabilities, and the size of U (r)."""
    scaling: PositiveFloat = 1.0
    """Factor of the update (s)."""
    rank_pattern: Ranks = {}
    """Other values of `cur_rank`, by module name."""


class LoraSettings(AdapterTargets):
    """What LoRA and the methods that start from it share."""

    rank: PositiveInt = 16
    """Rank of the update."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""


class LoraAdapter(LoraSettings):
    """LoRA (arXiv 2106.09685) or DoRA (arXiv 2402.09353), of PEFT."""

    method: Literal["lora", "dora"]
    """The adapter's method."""


class CordaAdapter(LoraSettings):
    """CorDA (arXiv 2406.05223), of PEFT: LoRA that starts from a part of the weight, chosen by its inputs."""

    method: Literal["corda"]
    """The adapter's method."""
    mode: Literal["kpm", "ipm"] = "kpm"
    """Train the components that the text excites least (knowledge-preserving) or most (previewing)."""
    calibration: CalibrationText = CalibrationText()
    """The text whose knowledge is kept, or for `ipm` previewed."""


class OsfAdapter(Section):
    """OSF (arXiv 2504.07097), of PEFT: trains the lesser singular directions of each weight."""

    method: Literal["osf"]
    """The adapter's method."""
    target_modules: TargetModules = None
    """Names of the adapted modules, `all-linear`, or null for the family's default."""
    effective_rank: Preserved = 0.5
    """Leading singular directions of each weight that stay: a number, or a share of its smaller side."""


class FullTraining(Section):
    """Training of the weights themselves, without an adapter; the result is a whole checkpoint."""

    method: Literal["full"]
    """The adapter's method."""
    target_modules: TargetModules = None
    """Names of the trained linear layers, `all-linear`, or null for every weight of the model."""
    exclude_modules: list[str] | None = None
    """Names of modules left out although they match."""

    @field_validator("exclude_modules")
    @classmethod
    def _left_out_of_something(cls, value: list[str] | None, info: ValidationInfo) -> list[str] | None:
        if value and info.data.get("target_modules") is None:
            raise ValueError("target_modules is null, which trains every weight: name the modules to train")
        return value


Adapter = (
    SecuraAdapter | CabrAdapter | CurLoraAdapter | LoraAdapter | CordaAdapter | OsfAdapter | FullTraining
)
"""Any method's section."""
AnyMethod = Annotated[Adapter, Field(discriminator="method")]
METHODS: tuple[str, ...] = tuple(
    method for section in get_args(Adapter) for method in get_args(section.model_fields["method"].annotation)
)
"""The names of all methods."""
WEIGHT_USES = {
    "osf": "takes the weights apart into singular triplets",
    "corda": "moves a part of the weights into its adapter",
    "full": "trains the weights themselves",
}
"""What a method does that needs whole weights in more than 4 bits."""

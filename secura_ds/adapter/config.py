"""Configuration of a SECURA adapter, as PEFT stores it in `adapter_config.json`."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from secura_ds.errors import UserError
from secura_ds.sharding import Restraint

T = TypeVar("T")


class AdapterType(str, enum.Enum):  # noqa: UP042 - a str enum like PEFT's own, which has no door for others
    """Our member of PEFT's enum of methods."""

    SECURA = "SECURA"


_CHOICES: dict[str, tuple[str, ...]] = {
    "selection": ("least", "sampled", "calibrated"),
    "init": ("block", "orthogonal", "orthonormal", "identity"),
    "strategy": ("M2", "M1"),
}
_APPLY = ("merge", "forward", "never")
_FORMS = ("update", "average")
_MODES = ("null", "rows", "project", "whiten", "contrast")

_SMAGNORM: dict[str, Any] = {"apply": "merge", "form": "update", "steepness": 6.0, "eps": 1e-10}
_CALIBRATION: dict[str, Any] = {
    "mode": "null", "text": None, "num_tokens": 7680, "energy": 0.9, "floor": 0.03, "seed": 0,
}  # fmt: skip


@dataclass
class SecuraConfig(PeftConfig):
    """SECURA: W + s C (U + A B) R with frozen C and R, limited by S-MagNorm (method.md).

    Raises:
        UserError: a value that is not allowed; the message says which and what is.
    """

    cur_rank: int = field(default=64, metadata={"help": "r: rows and columns of W that C and R are made of"})
    inner_rank: int = field(default=96, metadata={"help": "m: inner dimension of A (r, m) and B (m, r)"})
    scaling: float = field(default=1.0, metadata={"help": "s: factor of the update"})
    selection: str = field(default="least", metadata={"help": "'least', 'sampled' or 'calibrated'"})
    init: str = field(
        default="block",
        metadata={
            "help": "A: 'block' (W[:r, :m]), 'orthogonal' (of the block's size) or 'orthonormal' to start "
            "from, or the frozen 'identity'"
        },
    )
    strategy: str = field(
        default="M2", metadata={"help": "fold into U ('M2') or into the base weight ('M1')"}
    )
    fold_every: int = field(default=0, metadata={"help": "optimizer steps between folds; 0: only at the end"})
    smagnorm: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "apply 'merge'|'forward'|'never', form, steepness, eps or eps_relative"},
    )
    calibration: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "mode, text, num_tokens, energy, floor, seed; for selection 'calibrated'"},
    )
    seed: int = field(default=0, metadata={"help": "seed of sampled selection and orthogonal init"})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "names of the linear layers to adapt, a regular expression, or 'all-linear'"},
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "names not to adapt"})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "cur_rank by layer name"})
    inner_rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "inner_rank by layer name"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules trained and saved whole"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "layer indices to adapt"}
    )
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the layer list"})
    factors_saved: bool = field(default=False, metadata={"help": "C, R and A come with the weights file"})
    folded: bool = field(
        default=False, metadata={"help": "the weights file holds base weights changed by M1"}
    )
    base_quantization: dict[str, Any] | None = field(
        default=None, metadata={"help": "how the base model was quantized in training"}
    )
    quantized_modules: list[str] | None = field(
        default=None, metadata={"help": "every layer that was quantized in training, adapted or not"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = AdapterType.SECURA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        for name, allowed in _CHOICES.items():
            _check_choice(name, getattr(self, name), allowed)
        for name in ("cur_rank", "inner_rank"):
            _check_integer(name, getattr(self, name), 1)
            for layer, value in getattr(self, _PATTERNS[name]).items():
                _check_integer(f"{_PATTERNS[name]}[{layer!r}]", value, 1)
        if self.init == "identity" and (self.inner_rank, self.inner_rank_pattern) != (
            self.cur_rank,
            self.rank_pattern,
        ):
            raise UserError(
                f"init is 'identity', but cur_rank is {self.cur_rank} and inner_rank {self.inner_rank}: set "
                "inner_rank to cur_rank and inner_rank_pattern to rank_pattern, as A is square then"
            )
        _check_integer("fold_every", self.fold_every, 0)
        _check_integer("seed", self.seed, 0)
        _check_number("scaling", self.scaling, positive=False)
        self.smagnorm = _smagnorm(self.smagnorm)
        self.calibration = _calibration(self.calibration)
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError(
                "layers_pattern is set without layers_to_transform, so it has no effect: set both"
            )

    @property
    def contrasts(self) -> bool:
        """Whether C, too, comes from calibration, which then looks at the task as well."""
        return self.selection == "calibrated" and self.calibration["mode"] == "contrast"

    @property
    def apply(self) -> str:
        """Where S-MagNorm acts: 'merge', 'forward' or 'never'."""
        return str(self.smagnorm["apply"])

    @property
    def restraint(self) -> Restraint | None:
        """S-MagNorm's settings for `method` and `sharding`; None for apply 'never'."""
        if self.apply == "never":
            return None
        given = self.smagnorm
        return Restraint(given["steepness"], given["form"], given.get("eps"), given.get("eps_relative"))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary; sets become sorted lists, so that equal configs give equal files."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`; a saved config always says that its factors come with the weights."""
        PeftConfig.save_pretrained(replace(self, factors_saved=True), save_directory, **kwargs)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse keys of a saved config that this version does not know, instead of dropping them."""
        # PEFT passes this one to every config it loads, whether or not the method knows it.
        kwargs.pop("ephemeral_gpu_offload", None)
        unknown = sorted(set(kwargs) - set(cls.__dataclass_fields__))
        if unknown:
            raise UserError(
                f"adapter_config.json has unknown keys {unknown}: it was written by another version"
            )
        return kwargs


_PATTERNS = {"cur_rank": "rank_pattern", "inner_rank": "inner_rank_pattern"}


def by_layer(pattern: Mapping[str, T], layer_name: str, default: T) -> T:
    """The value that a pattern of PEFT's, such as `rank_pattern`, gives to one layer, else `default`."""
    return pattern.get(get_pattern_key(list(pattern), layer_name), default)


def _smagnorm(given: Mapping[str, Any]) -> dict[str, Any]:
    """`smagnorm` with its defaults, checked. Giving `eps_relative` replaces the default `eps`."""
    _check_keys("smagnorm", given, (*_SMAGNORM, "eps_relative"))
    given = {k: v for k, v in given.items() if v is not None or k not in ("eps", "eps_relative")}
    defaults = {k: v for k, v in _SMAGNORM.items() if not (k == "eps" and "eps_relative" in given)}
    result = {**defaults, **given}
    _check_choice("smagnorm.apply", result["apply"], _APPLY)
    _check_choice("smagnorm.form", result["form"], _FORMS)
    if "eps" in result and "eps_relative" in result:
        raise UserError("smagnorm.eps and smagnorm.eps_relative are both set: set exactly one")
    for name in ("steepness", "eps", "eps_relative"):
        if name in result:
            _check_number(f"smagnorm.{name}", result[name], positive=True)
    return result


def _calibration(given: Mapping[str, Any]) -> dict[str, Any]:
    """`calibration` with its defaults, checked."""
    _check_keys("calibration", given, tuple(_CALIBRATION))
    result = {**_CALIBRATION, **given}
    _check_choice("calibration.mode", result["mode"], _MODES)
    _check_integer("calibration.num_tokens", result["num_tokens"], 1)
    _check_integer("calibration.seed", result["seed"], 0)
    for name in ("energy", "floor"):
        share = result[name]
        if not isinstance(share, float) or not 0 < share < 1:
            raise UserError(f"calibration.{name} is {share!r}: a number between 0 and 1")
    if result["text"] is not None and not isinstance(result["text"], str):
        raise UserError(f"calibration.text is {result['text']!r}: a file name or null")
    return result


def _check_keys(name: str, given: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(given, Mapping):
        raise UserError(f"{name} is {given!r}: a mapping with the keys {', '.join(allowed)}")
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise UserError(f"{name} has no setting {unknown[0]!r}: allowed are {', '.join(allowed)}")


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} is {value!r}: allowed are {', '.join(repr(a) for a in allowed)}")


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {value!r}: an integer of at least {least}")


def _check_number(name: str, value: Any, *, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
        raise UserError(f"{name} is {value!r}: a finite number")
    if positive and value <= 0:
        raise UserError(f"{name} is {value!r}: a number above 0")

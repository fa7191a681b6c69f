"""What all parts of a recipe share: strictness, types of values and where a path lies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

# Type of an error between sections: its message says where, the location is too coarse to show.
RULE = "rule"

# Libraries hold counts in 32 bits, and numpy takes seeds of 32.
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def find_path(path: str, folder: Path) -> Path | None:
    """Where `path` lies: relative to the recipe's `folder`, else to the current folder; None if nowhere."""
    for base in (folder, Path.cwd()):
        candidate = base / os.path.expanduser(path)
        if os.path.exists(candidate):  # unlike Path's, False for a name that no file can have
            return candidate.resolve()
    return None


def _existing_file(value: str, info: ValidationInfo) -> str:
    folder = (info.context or {}).get("folder", Path.cwd())
    found = find_path(value, folder)
    if found is None or not found.is_file():
        raise ValueError(f"no such file, looked in {folder} and in {Path.cwd()}")
    return str(found)


File = Annotated[str, AfterValidator(_existing_file), Field(description="relative to the recipe's folder")]


class Section(BaseModel):
    """What all parts of a recipe share: no unknown keys, no silent conversion, no change after loading."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True,
        validate_default=True,
    )  # fmt: skip

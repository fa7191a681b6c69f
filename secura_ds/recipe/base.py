"""What all parts of a recipe share: strictness, types of values and where a path lies."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationInfo

from secura_ds.errors import redacted

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


class Document(Section):
    """A whole recipe: one file, and the folder it lies in."""

    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @property
    def folder(self) -> Path:
        """The folder of the recipe's file."""
        return self._folder

    def resolve_path(self, path: str) -> Path:
        """A path of the recipe as an absolute one: from the recipe's folder, else from the current folder."""
        return find_path(path, self._folder) or (self._folder / path).resolve()

    def resolved(self) -> dict[str, Any]:
        """Every setting, defaults and absolute paths included; loads again as a recipe. JSON-able.

        Credentials in URLs, in the description say, are redacted: this is what a run writes down.
        """
        settings = self.model_dump(mode="json", exclude={"schema_"})
        return dict(json.loads(redacted(json.dumps(settings))))

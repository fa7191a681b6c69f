"""The published configurations of the backbones that recipes are shipped for: facts that need no hub.

Each file in `configs/` holds, under `config`, what the config.json of all its models states, and under
`models`, by hub id, what each of them states besides.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from importlib.resources import files
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig


def shipped_config(model: str) -> PreTrainedConfig | None:
    """What the hub publishes as the configuration of `model`, a hub id; None if it is not shipped."""
    facts = _facts().get(model)
    if facts is None:
        return None
    # A copy: transformers edits the nested facts that it is given.
    config: PreTrainedConfig = CONFIG_MAPPING[facts["model_type"]].from_dict(copy.deepcopy(facts))
    config.name_or_path = model
    return config


def shipped_models() -> tuple[str, ...]:
    """The hub ids that `shipped_config` knows."""
    return tuple(_facts())


@cache
def _facts() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path in files("secura_ds.backbones").joinpath("configs").iterdir():
        shape = json.loads(path.read_text(encoding="utf-8"))
        found.update((model, {**shape["config"], **own}) for model, own in shape["models"].items())
    return dict(sorted(found.items()))

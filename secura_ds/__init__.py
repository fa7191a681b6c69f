"""SECURA adapters for models sharded by DeepSpeed ZeRO-3. Importing this package registers them with PEFT."""

from __future__ import annotations

from typing import Any

from secura_ds.adapter import SecuraConfig, SecuraModel, fold, save_adapter
from secura_ds.errors import UserError

__all__ = ["SecuraConfig", "SecuraModel", "UserError", "calibrate", "fold", "save_adapter"]


def __getattr__(name: str) -> Any:
    # Calibration needs generation and tokenizers, which adapters alone do not.
    if name == "calibrate":
        from secura_ds.calibration import calibrate

        return calibrate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""SECURA adapters for models sharded by DeepSpeed ZeRO-3. Importing this package registers them with PEFT."""

from __future__ import annotations

import logging
from typing import Any

# PEFT imports bitsandbytes, which without a GPU warns on every import that an optional kernel is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from secura_ds.adapter import SecuraConfig, SecuraModel, fold, save_adapter  # noqa: E402
from secura_ds.errors import UserError  # noqa: E402

__all__ = ["SecuraConfig", "SecuraModel", "UserError", "calibrate", "fold", "save_adapter"]


def __getattr__(name: str) -> Any:
    # Calibration needs generation and tokenizers, which adapters alone do not.
    if name == "calibrate":
        from secura_ds.calibration import calibrate

        return calibrate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

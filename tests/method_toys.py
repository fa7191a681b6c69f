"""A section of every method for the toy of `training_toys`, and how many parameters it trains there."""

from __future__ import annotations

import json
from typing import Any

TEXT = {"num_tokens": 480}
# The toy's q_proj is (64, 64), its v_proj (32, 64), in two layers.
ADAPTERS: dict[str, dict[str, Any]] = {
    "secura": {
        "method": "secura", "cur_rank": 7, "inner_rank": 9, "selection": "least",
        "smagnorm": {"apply": "forward"},
    },
    "cabr": {
        "method": "cabr", "cur_rank": 7, "inner_rank": 9, "selection": "least",
        "fold_every": 2, "strategy": "M1",
    },
    "cabr-calibrated": {
        "method": "cabr", "cur_rank": 7, "inner_rank": 9, "selection": "calibrated",
        "calibration": {"mode": "null", **TEXT},
    },
    "cur-lora": {"method": "cur-lora", "cur_rank": 7, "rank_pattern": {"v_proj": 5}},
    "lora": {"method": "lora", "rank": 3},
    "dora": {"method": "dora", "rank": 3},
    "corda": {"method": "corda", "rank": 3, "alpha": 6, "calibration": TEXT},
    "corda-ipm": {"method": "corda", "rank": 3, "mode": "ipm", "calibration": TEXT},
    "osf": {"method": "osf", "effective_rank": 24},
    "full": {"method": "full"},
    "full-targets": {"method": "full", "target_modules": ["v_proj"]},
}  # fmt: skip
_LORA = 2 * 3 * (64 + 64 + 32 + 64)
TRAINED = {
    "secura": 4 * 2 * 7 * 9,
    "cabr": 4 * 2 * 7 * 9,
    "cabr-calibrated": 4 * 2 * 7 * 9,
    "cur-lora": 2 * (7 * 7 + 5 * 5),
    "lora": _LORA,
    "dora": _LORA + 2 * (64 + 32),
    "corda": _LORA,
    "corda-ipm": _LORA,
    # 40 and 8 directions are left: a column, a row and a value each.
    "osf": 2 * (40 * (64 + 64 + 1) + 8 * (32 + 64 + 1)),
    "full": 2 * 260 * 64 + 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96 + 2 * 64),
    "full-targets": 2 * 32 * 64,
}


def override(method: str) -> str:
    """What `--set` is given for one of `ADAPTERS`."""
    return f"adapter={json.dumps(ADAPTERS[method])}"

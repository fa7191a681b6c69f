"""`launch/train.py` with one rank that fails by itself: raises after its third step, or stops for ever.

dying_worker.py {raise,sleep,refuse} RANK RECIPE [OPTIONS OF launch/train.py]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

import train as command  # noqa: E402

from secura_ds.errors import UserError, run_command  # noqa: E402
from secura_ds.ranks import end_process  # noqa: E402
from secura_ds.training import callbacks, watch  # noqa: E402

SHORT_PATIENCE = 6.0


def main() -> int:
    local_rank, how, failing, *arguments = sys.argv[1:]
    original = callbacks.Agreement.on_step_end
    watch.PATIENCE = SHORT_PATIENCE

    def fail(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 3 and os.environ["RANK"] == failing:
            if how == "raise":
                raise RuntimeError("boom\nand more of it")
            if how == "refuse":
                raise UserError("data/row.jsonl:7 is not to this rank's taste: mend it")
        original(self, args, state, control, **more)

    callbacks.Agreement.on_step_end = fail  # type: ignore[method-assign]
    return run_command(command.main, [*arguments, local_rank])


if __name__ == "__main__":
    end_process(main())

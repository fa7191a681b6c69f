"""One rank that meets the others, or does not: meeting_worker.py {meet,late,freeze,wait} PATIENCE."""

from __future__ import annotations

import os
import signal
import sys
import time

from secura_ds.errors import run_command
from secura_ds.ranks import end_process
from secura_ds.training import meeting


def main(_: object) -> int:
    behaviour, meeting.PATIENCE = sys.argv[1], float(sys.argv[2])
    if behaviour == "late":
        time.sleep(1)
    elif behaviour == "freeze":
        meeting.dist.init_process_group = lambda *_, **__: os.kill(os.getpid(), signal.SIGSTOP)
    elif behaviour == "wait":
        meeting.dist.init_process_group = lambda *_, **__: time.sleep(3600)
    began = time.monotonic()
    meeting.connect()
    print(f"met after {time.monotonic() - began:.1f} s")
    return 0


if __name__ == "__main__":
    end_process(run_command(main))

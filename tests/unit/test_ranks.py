"""What all ranks do together, on one rank of a real group."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from training_toys import free_port, quiet_environment

END = """
import atexit, os, sys
import torch.distributed as dist
from secura_ds.ranks import end_process

class Kept:
    def __del__(self):
        os.abort()  # as threads of a group do now and then, when the interpreter ends

if sys.argv[1] == "group":
    dist.init_process_group("gloo", rank=0, world_size=1)
    kept = Kept()
atexit.register(print, "what was registered for the end")
print("said before", end=" ")
end_process(3)
"""


def end_of(kind: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "end.py"
    script.write_text(END)
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(script), kind]
    return subprocess.run(command, env=quiet_environment(**port), capture_output=True, text=True, timeout=60)


def test_a_process_with_a_group_ends_without_finalizing_the_interpreter(tmp_path: Path) -> None:
    done = end_of("group", tmp_path)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == "said before what was registered for the end\n"


def test_a_process_alone_ends_as_any_other(tmp_path: Path) -> None:
    done = end_of("alone", tmp_path)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == "said before what was registered for the end\n"

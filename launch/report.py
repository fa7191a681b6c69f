"""Write one self-contained HTML page from a run or from task sequences, or a comparison of several."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from secura_ds.errors import run_command
from secura_ds.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, write the page and print its path."""
    parser = argparse.ArgumentParser(prog="launch/report.py", description=__doc__)
    parser.add_argument(
        "run_dir",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="the output_dir of launch/train.py, or of launch/continual.py",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page (default: RUN_DIR/report.html, or comparison.html here for several runs)",
    )
    options = parser.parse_args(arguments)
    print(write_report(options.run_dir, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

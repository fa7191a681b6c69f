"""Merge an adapter into its base model, streaming: base shards in, one merged Hugging Face checkpoint out.

Interrupted by Ctrl-C, SIGTERM or SIGUSR1 it leaves only OUT.partial; the same command again goes on from the
last finished shard.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import secura_ds  # noqa: F401 - registers our adapter with PEFT
from secura_ds.backbones import resolve_base
from secura_ds.errors import run_command
from secura_ds.files import atomic_write_json
from secura_ds.merge import MergeReport, merge


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, merge, and say what was done."""
    options = _parser().parse_args(arguments)
    report = merge(
        resolve_base(options.base, options.revision),
        options.adapter,
        options.out,
        onto=options.onto,
        check=not options.no_check,
        overwrite=options.overwrite,
        progress=not options.quiet,
        workers=options.workers,
    )
    run = options.adapter.resolve().parent
    if (run / "recipe.resolved.json").is_file():
        atomic_write_json(run / "merge.json", asdict(report))
    print(_summary(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch/merge.py", description=__doc__)
    parser.add_argument("--base", required=True, help="checkpoint folder, hub id or embedded:smollm2-135m")
    parser.add_argument("--revision", help="branch, tag or commit, if the base is a hub id")
    parser.add_argument("--adapter", required=True, type=Path, metavar="DIR", help="an adapter of any method")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder of the merged checkpoint"
    )
    parser.add_argument(
        "--onto",
        choices=("trained", "original"),
        default="trained",
        help="after 4-bit training: onto the dequantized weights it saw (default), or the base's own",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that share the shards (default 1)"
    )
    parser.add_argument(
        "--no-check", action="store_true", help="leave out the strict load and the logit comparison"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _summary(report: MergeReport) -> str:
    counts = f"{report.adapted_tensors} tensors adapted, {report.untouched_tensors} untouched"
    if report.dequantized_tensors:
        counts += f", {report.dequantized_tensors} dequantized"
    gap = f"not measured: {report.check_skipped}"
    if report.max_logit_gap is not None:
        gap = f"{report.max_logit_gap:.3g} (KL {report.kl:.3g} nats a token)"
    onto = ""
    if report.trained_in_4_bits:
        onto = {
            "trained": "merged onto the 4-bit weights that training saw, dequantized\n",
            "original": "merged onto the base's own weights; training saw them rounded to 4 bits\n",
        }[report.onto]
    memory = f"{report.peak_memory_bytes / 2**20:.0f} MiB"
    if report.workers > 1:
        memory += (
            f" in one of {report.workers} workers, {report.peak_memory_sum_bytes / 2**20:.0f} MiB in all"
        )
    return (
        f"{report.out}: {report.bytes / 1e9:.2f} GB in {report.seconds:.1f} s, {counts}\n"
        f"peak memory of the merge: {memory}\n"
        f"{onto}max logit gap between adapter model and merged model: {gap}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))

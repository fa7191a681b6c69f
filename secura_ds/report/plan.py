"""A plan as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from secura_ds.plan import Change, Plan, Verdict
from secura_ds.plan.traffic import seconds
from secura_ds.report.numbers import count, memory
from secura_ds.report.table import format_table

WORDS = {
    "frozen_weights": "frozen weights",
    "quantization_constants": "constants of 4-bit weights",
    "persistent_weights": "small weights kept whole",
    "adapter_weights": "trained parameters",
    "adapter_buffers": "adapter's frozen factors",
    "model_buffers": "model's buffers",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "fp32_masters": "fp32 masters",
    "reduce_buckets": "reduce buckets",
    "gathered_weights": "gathered layers",
    "activations": "activations",
    "logits_and_loss": "logits and loss",
    "backward_buckets": "buckets of the backward pass",
    "library_workspaces": "libraries' workspaces",
}


def plan_table(planned: Plan, verdict: Verdict, changes: Sequence[Change], *, link: float) -> str:
    """Everything a plan says: memory of a rank by part, phases, host, traffic, disk, and the verdict.

    Args:
        link: GB/s between ranks, for the time of a step's communication.
    """
    peak = planned.step_bytes
    parts = [
        (WORDS.get(name, name), memory(size), f"{100 * size / peak:.1f} %")
        for name, size in planned.parts.items()
        if size
    ]
    parts.append(("training step, at its fullest", memory(peak), "100.0 %"))
    blocks = [
        _headline(planned),
        format_table(("per rank", "bytes", "share"), parts),
        format_table(("phase", "most per rank"), _rows(planned.phases)),
        format_table(("main memory per node", "bytes"), _rows(planned.host)),
        format_table(("files", "bytes"), _rows(planned.disk)),
    ]
    if any(planned.traffic.values()):
        time = seconds(planned.traffic, link)
        blocks.append(format_table(("received per rank and step", "bytes"), _rows(planned.traffic)))
        blocks.append(f"{time:.2f} s a step over a link of {link:g} GB/s, less what computation hides")
    blocks.append(verdict_text(verdict, changes, planned.nodes))
    return "\n\n".join(blocks)


def _headline(planned: Plan) -> str:
    stage = f"ZeRO-{planned.zero_stage}" if planned.zero_stage else "no DeepSpeed"
    where = "GPUs" if planned.device == "cuda" else "CPU processes"
    return (
        f"{planned.recipe}: {planned.model}, {count(planned.all_parameters)} parameters, "
        f"{count(planned.trained_parameters)} trained\n"
        f"{planned.ranks} {where} on {planned.nodes} node{'s' * (planned.nodes > 1)}, {stage}, "
        f"{planned.attention} attention, {planned.batch} x {planned.length} tokens, {planned.learnt} learnt"
    )


def _rows(values: dict[str, int]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), memory(size)) for name, size in values.items() if size]


def verdict_text(verdict: Verdict, changes: Sequence[Change], nodes: int = 1) -> str:
    """Whether it fits, by how much, and what would help."""
    reserve = f" and {memory(verdict.reserve)} in reserve" if verdict.reserve else ""
    needs = f"{memory(verdict.needed)} per rank ({verdict.phase.replace('_', ' ')}){reserve}"
    if verdict.limit is None:
        return f"needs {needs}; give --gpu-memory for a verdict"
    lines = []
    if verdict.excess > 0:
        lines.append(
            f"does not fit: needs {needs}, {memory(verdict.excess)} more than {memory(verdict.limit)}"
        )
    if verdict.host_excess > 0:
        lines.append(
            f"does not fit main memory: a node needs {memory(verdict.host_needed)}, "
            f"{memory(verdict.host_excess)} more than {memory(verdict.host_limit or 0)}"
        )
    if not lines:
        return f"fits: needs {needs} of {memory(verdict.limit)}, {memory(-verdict.excess)} left"
    for change in changes:
        end = "and it fits" if change.fits else "not enough alone"
        lines.append(f"  {change.text}: frees {memory(change.frees)}, {end}")
    return "\n".join(lines)

"""The memory check at the start of a run: the plan against what the devices have free."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from secura_ds import environment
from secura_ds.backbones import load_config
from secura_ds.errors import UserError, first_line
from secura_ds.plan import Devices, Plan, Verdict, Work, advice, here, judge, plan
from secura_ds.ranks import from_all
from secura_ds.recipe import CabrSettings, CordaAdapter, Recipe, changed

logger = logging.getLogger(__name__)

MARGIN = 0.1  # how far a plan may be off
RESERVE = 2**29  # of a GPU, once CUDA's context is there: NCCL's buffers and fragmentation
GIB = 2**30


def check_memory(
    recipe: Recipe, rows: Dataset, settings: Mapping[str, Any] | None, *, calibrates: bool = True
) -> Plan | None:
    """Plan the run and compare it with this machine; all ranks come to the same decision.

    Args:
        rows: the training data, whose longest rows say how large a forward pass becomes.
        settings: the DeepSpeed configuration in use.
        calibrates: False where the run goes on with the factors of an earlier one.

    Returns:
        the plan, or None where the recipe wants no check or the architecture cannot be planned.

    Raises:
        UserError: the run needs more than there is, by more than the plan may be off.
    """
    if recipe.training.memory_check == "off":
        return None
    if not calibrates:
        recipe = _without_calibration(recipe)
    ranks, per_node = environment.world_size(), environment.local_world_size()
    devices = _scarcest(here(per_node=per_node, nodes=max(1, ranks // per_node)))
    config, work = load_config(recipe.backbone), largest_pass(rows, recipe)
    try:
        planned = plan(
            recipe,
            config,
            ranks=ranks,
            device=devices.kind,
            nodes=devices.nodes,
            settings=settings,
            work=work,
        )
    except UserError:
        raise
    except Exception as error:
        # An architecture of the hub's own may do what the meta device cannot: that is no reason not to train.
        logger.warning("the memory of this run cannot be planned (%s)", first_line(error))
        return None
    verdict = judge(planned, devices, reserve=RESERVE if devices.kind == "cuda" else 0)
    # The processes are here already.
    verdict = replace(verdict, host_needed=verdict.host_needed - planned.host["processes"])
    logger.info("%s", announcement(verdict))
    if verdict.fits:
        return planned
    changes = advice(recipe, config, planned, devices, settings=settings, work=work, reserve=verdict.reserve)
    remedy = f"try {changes[0].text}, which frees {changes[0].frees / GIB:.1f} GiB" if changes else ""
    message = shortage(verdict, planned, remedy)
    if recipe.training.memory_check == "refuse" and far_too_large(verdict):
        raise UserError(f'{message} (training.memory_check "warn" starts it all the same)')
    logger.warning("%s", message)
    return planned


def _without_calibration(recipe: Recipe) -> Recipe:
    """A recipe that holds as much in training, and nothing before it."""
    adapter = recipe.adapter
    if isinstance(adapter, CabrSettings):
        return changed(recipe, ["adapter.selection=least"])
    if isinstance(adapter, CordaAdapter):
        same = {"method": "lora", **adapter.model_dump(exclude={"method", "mode", "calibration"})}
        return changed(recipe, [f"adapter={json.dumps(same)}"])
    return recipe


def largest_pass(rows: Dataset, recipe: Recipe) -> Work:
    """The largest forward pass that the data can make: the longest rows with most to learn, together."""
    lengths, learnt = row_sizes(rows)
    batch = min(recipe.training.micro_batch_size, len(lengths))
    longest, most = np.sort(lengths)[-batch:], np.sort(learnt)[-batch:]
    if recipe.data.packing:
        return Work(1, int(longest.sum()), int(most.sum()), padded=False, packed=True)
    return Work(batch, int(longest[-1]), int(most.sum()), padded=batch > 1)


def row_sizes(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each row, and how many of them are learnt."""
    labels = rows.data.column("labels").combine_chunks()
    if isinstance(labels, pa.ChunkedArray):
        labels = labels.chunk(0)
    ends = labels.offsets.to_numpy()
    counted = np.concatenate([[0], np.cumsum(labels.values.to_numpy(zero_copy_only=False) != -100)])
    return np.diff(ends), counted[ends[1:]] - counted[ends[:-1]]


def _scarcest(own: Devices) -> Devices:
    """The machine as the rank with least memory sees it, on every rank."""
    seen = from_all((own.memory, own.host_memory))
    return replace(own, memory=min(m for m, _ in seen), host_memory=min(h for _, h in seen))


def far_too_large(verdict: Verdict) -> bool:
    """True where more is lacking than the plan may be off."""
    limit, host = verdict.limit or 0, verdict.host_limit or 0
    return verdict.excess > MARGIN * limit or verdict.host_excess > MARGIN * host


def announcement(verdict: Verdict) -> str:
    """One line: what is planned, and what there is."""
    limit = "unknown" if verdict.limit is None else f"{verdict.limit / GIB:.2f} GiB"
    return (
        f"planned memory per rank: {verdict.needed / GIB:.2f} GiB ({verdict.phase.replace('_', ' ')}), "
        f"available: {limit}"
    )


def shortage(verdict: Verdict, planned: Plan, remedy: str) -> str:
    """One line: what is lacking, what takes most, and what to change."""
    if verdict.host_excess > 0 and verdict.excess <= 0:
        use = max(planned.host, key=lambda name: planned.host[name])
        what = (
            f"main memory is short: this run needs {verdict.host_needed / GIB:.1f} GiB on each node "
            f"({use.replace('_', ' ')} most of it), {(verdict.host_limit or 0) / GIB:.1f} GiB are available"
        )
    else:
        part, phase = verdict.largest_part, verdict.phase.replace("_", " ")
        most = f"{planned.parts[part] / GIB:.2f} GiB of it {part.replace('_', ' ')}"
        where = "GPU" if torch.cuda.is_available() else "process"
        reserve = f" and {verdict.reserve / GIB:.1f} GiB in reserve" if verdict.reserve else ""
        what = (
            f"memory is short: this run needs {verdict.needed / GIB:.2f} GiB per {where}{reserve} "
            f"({most if phase == 'training' else phase + ' takes most'}), "
            f"{(verdict.limit or 0) / GIB:.2f} GiB are available"
        )
    return f"{what}; {remedy}" if remedy else what

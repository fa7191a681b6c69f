"""One rank of test_calibration: calibrates a ZeRO-3 partitioned toy model and writes what it got."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from calibration_toys import calibrate_all_modes
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from secura_ds.calibration import sensitivity, text
from secura_ds.errors import UserError
from secura_ds.method import calibrated
from secura_ds.ranks import end_process
from secura_ds.sharding import assert_partitioned, whole

ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def watch_factors(model: torch.nn.Module) -> None:
    """Fail where a sharded weight is whole while factors are computed from a copy of one of them."""
    compute = calibrated.factors

    def checked(*arguments: Any, **options: Any) -> torch.Tensor:
        assert_partitioned(model)
        return compute(*arguments, **options)

    calibrated.factors = checked


def main(base: Path, out: Path) -> None:
    torch.set_num_threads(1)
    text.SEQUENCE_LENGTH, text.GENERATION_BATCH, sensitivity.FORWARD_BATCH = 20, 10, 2
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for a minute
    deepspeed.init_distributed("gloo", verbose=False)
    rank = torch.distributed.get_rank()
    alive = HfDeepSpeedConfig(ZERO3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.requires_grad_(False)
    before = {name: whole(p) for name, p in model.named_parameters()}
    folder = out / str(rank)
    folder.mkdir()
    watch_factors(model)
    result = calibrate_all_modes(model, folder)
    assert_partitioned(model)
    assert all(torch.equal(whole(p), before[name]) for name, p in model.named_parameters())
    torch.save(result, out / f"{rank}.pt")

    norm = model.model.layers[1].post_attention_layernorm.weight
    with deepspeed.zero.GatheredParameters([norm], modifier_rank=0):
        norm.zero_()
    try:
        calibrate_all_modes(model, folder)
    except UserError as error:
        (out / f"{rank}.error").write_text(str(error))
    del alive
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    end_process(0)

"""What each rank runs for `test_tasks.py`: scores of a partitioned model with an adapter, written as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from secura_ds.ranks import end_process
from secura_ds.sharding import assert_partitioned, is_sharded
from secura_ds.tasks import load_tasks, score_tasks


def main(folder: Path) -> None:
    zero3 = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for a minute
    deepspeed.init_distributed("gloo")
    keep_alive = HfDeepSpeedConfig(zero3)
    model = LlamaForCausalLM.from_pretrained(folder / "backbone")
    assert all(is_sharded(parameter) for parameter in model.parameters())
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    tokenizer = AutoTokenizer.from_pretrained(folder / "backbone")
    tasks = load_tasks(["written", "chosen"], [folder])
    found = score_tasks(adapted, tokenizer, tasks, batch_size=2, progress=False)
    assert_partitioned(model)
    del keep_alive
    (folder / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
    end_process(0)

"""What each rank runs for `test_evaluation.py`: an evaluation of a partitioned model, written as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch.distributed as dist
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from secura_ds.evaluation import evaluate
from secura_ds.ranks import end_process
from secura_ds.recipe import EvaluationRecipe
from secura_ds.sharding import is_sharded


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
    recipe = EvaluationRecipe.model_validate_json((folder / "evaluation.json").read_text())
    document = evaluate(model, AutoTokenizer.from_pretrained(folder / "backbone"), recipe, progress=False)
    del keep_alive
    (folder / f"found-{dist.get_rank()}.json").write_text(json.dumps(document))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
    end_process(0)

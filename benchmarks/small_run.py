"""A training run small enough to be made hundreds of times: its backbone, its examples, its recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

RECIPE: dict[str, Any] = {
    "name": "chaos",
    "backbone": {"model": "backbone", "dtype": "float32"},
    "adapter": {
        "method": "secura",
        "selection": "least",
        "cur_rank": 7,
        "inner_rank": 9,
        "strategy": "M1",
        "fold_every": 3,
    },
    "data": {"sources": [{"path": "rows.jsonl"}], "max_length": 64},
    "training": {
        "output_dir": "run",
        "learning_rate": 1e-3,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "save_steps": 5,
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": [],
    },
}
ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
    "steps_per_print": 1000000,
}


def write_inputs(folder: Path) -> None:
    """A backbone of a million weights, its tokenizer, a hundred examples and a recipe."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=260, num_hidden_layers=4, initializer_range=0.3, **shape)
    LlamaForCausalLM(config).save_pretrained(folder / "backbone", max_shard_size="400KB")
    words = ["<pad>", "<eos>", "<unk>", "add", "and", "sum", *map(str, range(200))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder / "backbone")
    rows = [{"prompt": f"add {i} and {i % 7}", "completion": f" sum {i + i % 7}"} for i in range(100)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    (folder / "zero3.json").write_text(json.dumps(ZERO3))

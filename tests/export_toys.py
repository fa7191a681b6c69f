"""Toy runs that end with a merged checkpoint, in one process and on two ranks, and what it must equal."""

from __future__ import annotations

from pathlib import Path

import torch
from calibration_toys import toy_tokenizer
from training_toys import write_toy
from transformers import LlamaConfig, LlamaForCausalLM

from secura_ds.merge import merge

BF16 = ["backbone.model=narrow", "backbone.dtype=bfloat16"]
NF4 = [*BF16, "backbone.quantization.kind=nf4"]
LORA = 'adapter={"method":"lora","rank":3,"target_modules":["q_proj"]}'
DORA = 'adapter={"method":"dora","rank":3,"target_modules":["q_proj"]}'
CORDA = 'adapter={"method":"corda","rank":3,"calibration":{"num_tokens":320}}'
HEAD = 'adapter.modules_to_save=["lm_head"]'
FORWARD = "adapter.smagnorm.apply=forward"
CASES: dict[str, list[str]] = {
    "fp32-forward-all": [FORWARD, "adapter.target_modules=all-linear"],
    "fp32-M1": ["adapter.strategy=M1", FORWARD],
    "bf16-head": [*BF16, HEAD, "adapter.smagnorm.eps=null", "adapter.smagnorm.eps_relative=1.0"],
    "bf16-M1-never": [*BF16, "adapter.strategy=M1", "adapter.smagnorm.apply=never"],
    "nf4": NF4,
    "nf4-forward": [*NF4, FORWARD],
}
CASES_ALONE: dict[str, list[str]] = {
    "nf4-lora": [*NF4, LORA],
    "fp32-dora": [DORA],
    "fp32-cur-lora": ['adapter={"method":"cur-lora","cur_rank":5}'],
    "fp32-cabr-M1": ['adapter={"method":"cabr","cur_rank":7,"inner_rank":9,"strategy":"M1","fold_every":2}'],
    "fp32-corda": [CORDA],
    "bf16-corda": [*BF16, CORDA],
    "fp32-osf": ['adapter={"method":"osf"}'],
    # The checkpoint is wider, or narrower, than what training holds.
    "rounded": ["backbone.dtype=bfloat16", "adapter.smagnorm.apply=never"],
    "rounded-M1": ["backbone.dtype=bfloat16", "adapter.strategy=M1"],
    "widened": ["backbone.model=narrow", FORWARD],
}
COMMON = ["training.save_merged=true", "training.max_steps=3"]


def write_export_toy(folder: Path) -> Path:
    """The toy recipe with two sharded backbones: `backbone` in fp32 with a tied head, `narrow` in bf16."""
    recipe = write_toy(folder)
    for name, dtype, tied in (("backbone", torch.float32, True), ("narrow", torch.bfloat16, False)):
        for file in (folder / name).glob("model*"):
            file.unlink()
        # bitsandbytes misreads rows on CPUs whose length is no multiple of 64.
        config = LlamaConfig(
            vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=256, eos_token_id=257, initializer_range=0.3,
            tie_word_embeddings=tied,
        )  # fmt: skip
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder / name, max_shard_size="60KB")
        toy_tokenizer().save_pretrained(folder / name)
    return recipe


def differences(folder: Path, name: str, options: list[str]) -> list[str]:
    """Files of `name`'s merged checkpoint that differ from those of the offline merge of its adapter."""
    base = folder / ("narrow" if BF16[0] in options else "backbone")
    offline, live = folder / f"{name}-offline", folder / name / "merged"
    merge(base, folder / name / "adapter", offline, check=False, progress=False)
    names = {file.name for place in (offline, live) for file in place.iterdir()} - {"merge.json"}
    assert len([file for file in names if file.endswith(".safetensors")]) > 3
    return sorted(n for n in names if not _same(offline / n, live / n))


def _same(first: Path, second: Path) -> bool:
    return first.is_file() and second.is_file() and first.read_bytes() == second.read_bytes()

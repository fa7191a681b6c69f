"""A toy tokenizer that loses no byte, with a chat template, and a toy model for it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer(*, template: str | None = CHATML, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """One token a byte; the special tokens have the ids 256 to 258."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=SPECIAL[0], eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def toy_model(seed: int = 0) -> LlamaForCausalLM:
    """A random Llama in fp32 whose next token is far from certain, yet far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, eos_token_id=258, bos_token_id=None, pad_token_id=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """The rows, one a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

"""A toy Llama and a byte tokenizer with a chat template, for tests of calibration."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secura_ds.adapter import SecuraConfig
from secura_ds.calibration import calibrate

EXAMPLES = [
    {
        "input_ids": [(7 * i + 3 * j) % 250 for j in range(12 + i % 5)],
        "labels": [-100] * 6 + [(7 * i + 3 * j) % 250 for j in range(6, 12 + i % 5)],
    }
    for i in range(40)
]
"""Rows to learn, of 12 to 16 tokens, half of them prompt."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def toy_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "<|end|>", "<pad>", "<|turn|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<pad>",
        chat_template=chat_template,
    )


def toy_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=256,
        eos_token_id=257,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype).train()


def assert_same_directions(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Columns are equal but for their signs."""
    signs = (found * expected).sum(0).sign()
    torch.testing.assert_close(found * signs, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def calibrate_all_modes(model: LlamaForCausalLM, folder: Path) -> dict[str, Tensor]:
    """Factors of every mode and the text, under flat names; the first mode lets the model write the text.

    The last is contrast with so few tokens that layers of width 96 keep rows.
    """
    result: dict[str, Tensor] = {}
    saved = None
    runs = [(mode, 500) for mode in ("null", "rows", "project", "whiten", "contrast")] + [("contrast", 40)]
    for mode, num_tokens in runs:
        config = SecuraConfig(
            cur_rank=8,
            inner_rank=12,
            selection="calibrated",
            target_modules="all-linear",
            calibration={"mode": mode, "num_tokens": num_tokens},
        )
        made = calibrate(
            model,
            toy_tokenizer(),
            config,
            text_path=saved,
            examples=EXAMPLES,
            progress=False,
            memory_limit=300_000,
        )
        if saved is None:
            saved = folder / "calibration.jsonl"
            made.save(saved)
            result["token_ids"] = made.token_ids
        result |= {f"{mode}-{num_tokens}.{name}": R for name, R in made.factors.items()}
        result |= {f"{mode}-{num_tokens}.{name}.C": C for name, C in made.outputs.items()}
    return result

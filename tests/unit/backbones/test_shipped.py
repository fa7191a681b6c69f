"""The published configurations: their figures, and loading them where the hub gives none."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from family_toys import BACKBONES, shrunken

from secura_ds.backbones import empty_model, load_config, load_model, load_tokenizer, shipped_config
from secura_ds.backbones.shipped import shipped_models
from secura_ds.errors import UserError
from secura_ds.recipe import BackboneRecipe

LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


# As the publishers count them.
@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("Qwen/Qwen2-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2-1.5B", 1_543_714_304),
        ("Qwen/Qwen2-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2-7B", 7_615_616_512),
        ("google/gemma-2-2b-it", 2_614_341_888),
        ("google/gemma-2-2b", 2_614_341_888),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
    ],
)
def test_parameters_are_the_published_number(model: str, parameters: int) -> None:
    config = shipped_config(model)
    assert config is not None and config.name_or_path == model
    built = empty_model(config, dtype=torch.bfloat16, attention="eager")
    assert type(built).__name__ == config.architectures[0]
    assert sum(parameter.numel() for parameter in built.parameters()) == parameters


@pytest.mark.parametrize(
    ("model", "facts"),
    [
        (
            "Qwen/Qwen2-1.5B-Instruct",
            {
                "eos_token_id": 151645,
                "max_position_embeddings": 32768,
                "sliding_window": None,  # 32768, but switched off
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": True,
            },
        ),
        ("Qwen/Qwen2-7B-Instruct", {"eos_token_id": 151645, "tie_word_embeddings": False}),
        ("Qwen/Qwen2-7B", {"eos_token_id": 151643, "max_position_embeddings": 131072}),
        (
            "google/gemma-2-2b-it",
            {
                "bos_token_id": 2,
                "eos_token_id": [1, 107],
                "pad_token_id": 0,
                "head_dim": 256,  # not 2304 / 8
                "query_pre_attn_scalar": 256,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "sliding_window": 4096,
                "layer_types": ["sliding_attention", "full_attention"] * 13,
                "hidden_activation": "gelu_pytorch_tanh",
                "tie_word_embeddings": True,
                "dtype": torch.bfloat16,
            },
        ),
        ("google/gemma-2-2b", {"eos_token_id": 1, "dtype": torch.float32}),
        (
            "meta-llama/Meta-Llama-3-8B-Instruct",
            {
                "eos_token_id": 128009,
                "max_position_embeddings": 8192,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
                "rms_norm_eps": 1e-5,
                "tie_word_embeddings": False,
            },
        ),
        (
            "meta-llama/Llama-3.1-8B-Instruct",
            {
                "eos_token_id": [128001, 128008, 128009],
                "max_position_embeddings": 131072,
                "rope_parameters": LLAMA31_ROPE,
            },
        ),
        ("meta-llama/Meta-Llama-3.1-8B", {"eos_token_id": 128001, "rope_parameters": LLAMA31_ROPE}),
    ],
)
def test_particulars(model: str, facts: dict[str, Any]) -> None:
    config = shipped_config(model)
    assert {name: getattr(config, name) for name in facts} == facts


def test_each_call_gives_a_configuration_of_its_own() -> None:
    first = shipped_config("meta-llama/Llama-3.1-8B-Instruct")
    assert first is not None
    first.rope_parameters["factor"] = 2.0
    assert shipped_config("meta-llama/Llama-3.1-8B-Instruct").rope_parameters == LLAMA31_ROPE  # type: ignore[union-attr]


def test_other_models_are_not_shipped() -> None:
    assert len(shipped_models()) == 12
    assert shipped_config("Qwen/Qwen2-72B") is None
    assert shipped_config("qwen2-7b") is None


def test_toys_differ_from_the_published_in_dimensions_only() -> None:
    """What other tests say of a family on its toy holds for the family."""
    dimensions = {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "query_pre_attn_scalar",
        "max_position_embeddings",
        "sliding_window",
        "layer_types",
        "initializer_range",
    }
    for backbone in BACKBONES.values():
        true, toy = backbone.config.to_dict(), shrunken(backbone.config).to_dict()
        for facts in (true, toy):
            facts["rope_parameters"].pop("original_max_position_embeddings", None)
            # Whether a head's dimension follows from the width.
            head_dim = facts.get("head_dim") or facts["hidden_size"] // facts["num_attention_heads"]
            facts["follows"] = head_dim * facts["num_attention_heads"] == facts["hidden_size"]
            facts["kinds of layers"] = set(facts.get("layer_types") or [])
        assert true.keys() == toy.keys()
        assert {name for name in true if true[name] != toy[name]} <= dimensions


class _Hub(ThreadingHTTPServer):
    """A hub that answers every question with one refusal, and counts them."""

    status, code = 500, ""
    asked = 0


class _Refusal(BaseHTTPRequestHandler):
    server: _Hub

    def do_HEAD(self) -> None:
        self.server.asked += self.path.endswith("/config.json")
        self.send_response(self.server.status)
        self.send_header("X-Error-Code", self.server.code)
        self.send_header("X-Error-Message", "refused")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[_Hub]:
    server = _Hub(("127.0.0.1", 0), _Refusal)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


GEMMA = BackboneRecipe(model="google/gemma-2-2b-it")


@pytest.mark.parametrize(("status", "code"), [(401, "GatedRepo"), (403, "GatedRepo"), (503, "")])
def test_without_access_the_shipped_configuration_is_taken(
    hub: _Hub, caplog: pytest.LogCaptureFixture, status: int, code: str
) -> None:
    hub.status, hub.code = status, code
    with caplog.at_level(logging.WARNING, logger="secura_ds"):
        config = load_config(GEMMA)
    assert config.to_dict() == shipped_config(GEMMA.model).to_dict()  # type: ignore[union-attr]
    assert hub.asked == 1  # no repeated tries
    (record,) = (record for record in caplog.records if record.name.startswith("secura_ds"))
    message = record.getMessage()
    assert "\n" not in message
    assert message.startswith("the hub does not give the configuration of google/gemma-2-2b-it (")
    assert message.endswith("): going by the one shipped with secura_ds")


def test_without_a_network_the_shipped_configuration_is_taken_at_once(hub: _Hub) -> None:
    hub.shutdown()
    hub.server_close()
    assert load_config(GEMMA).hidden_size == 2304


def test_a_cached_configuration_goes_first(hub: _Hub, tmp_path: Path) -> None:
    hub.status, hub.code = 401, "GatedRepo"
    folder = tmp_path / "hub" / "models--google--gemma-2-2b-it"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    cached = shipped_config(GEMMA.model)
    assert cached is not None
    (snapshot / "config.json").write_text(json.dumps(cached.to_dict() | {"sliding_window": 2048}))
    assert load_config(GEMMA).sliding_window == 2048


def test_a_wrong_revision_is_not_papered_over(hub: _Hub) -> None:
    hub.status, hub.code = 404, "RevisionNotFound"
    with pytest.raises(UserError, match="google/gemma-2-2b-it at revision no-such cannot be loaded"):
        load_config(BackboneRecipe(model="google/gemma-2-2b-it", revision="no-such"))


def test_other_models_need_the_hub(hub: _Hub) -> None:
    hub.status, hub.code = 401, "GatedRepo"
    with pytest.raises(UserError, match="backbone.model google/gemma-2-9b-it cannot be loaded"):
        load_config(BackboneRecipe(model="google/gemma-2-9b-it"))


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_weights_and_tokenizer_are_never_made_up(hub: _Hub, load: Any) -> None:
    hub.status, hub.code = 401, "GatedRepo"
    with pytest.raises(UserError) as error:
        load(GEMMA)
    message = str(error.value)
    assert message.startswith("backbone.model google/gemma-2-2b-it cannot be loaded (")
    assert message.endswith("for a gated model, `hf auth login` and its licence page")
    assert "\n" not in message

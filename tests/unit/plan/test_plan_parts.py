"""What a rank holds between steps, against numbers worked out by hand for a tiny Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, PreTrainedConfig

from secura_ds.plan import Plan, plan
from secura_ds.recipe import Recipe, load_recipe

SECURA = {
    "method": "secura",
    "selection": "least",
    "cur_rank": 8,
    "inner_rank": 12,
    "target_modules": ["q_proj", "v_proj"],
}
LORA = {"method": "lora", "rank": 4, "target_modules": ["q_proj", "v_proj"]}
# Elements of each weight: embedding and head, then of a layer q, k, v, o, gate, up, down and two norms.
HEADS, LAYER, NORM = 260 * 64, (4096, 2048, 2048, 4096, 6144, 6144, 6144, 64, 64), 64
WEIGHTS = [HEADS, HEADS, NORM, *LAYER, *LAYER]
LINEAR = LAYER[:7] * 2
TRAINED = 2 * 2 * 2 * 8 * 12  # layers, targets, A and B of 8 x 12


def tiny() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=256,
        eos_token_id=257,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe beside the configuration of its backbone; there are no weights to read."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny().save_pretrained(folder / "backbone")
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    (folder / "zero2.json").write_text(json.dumps(zero(2)))
    (folder / "zero3.json").write_text(json.dumps(zero(3)))
    recipe = {
        "name": "tiny",
        "backbone": {"model": "backbone", "attention": "sdpa"},
        "adapter": SECURA,
        "data": {"sources": [{"path": "rows.jsonl"}], "max_length": 32},
        "training": {"output_dir": "run", "learning_rate": 1e-3, "max_steps": 1, "micro_batch_size": 2},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


def zero(stage: int, **more: Any) -> dict[str, Any]:
    section = {
        "stage": stage,
        "overlap_comm": False,
        "reduce_bucket_size": 1000,
        "allgather_bucket_size": 1000,
    }
    return {"zero_optimization": {**section, "stage3_param_persistence_threshold": 0, **more}}


def recipe_of(folder: Path, *changes: str) -> Recipe:
    return load_recipe(folder / "recipe.json", changes)


def planned(folder: Path, *changes: str, ranks: int = 1, **more: Any) -> Plan:
    return plan(recipe_of(folder, *changes), tiny(), ranks=ranks, device=more.pop("device", "cpu"), **more)


def test_one_process_holds_everything_whole(folder: Path) -> None:
    found = planned(folder)
    assert found.trained_parameters == TRAINED
    assert found.all_parameters == sum(WEIGHTS) + TRAINED
    assert found.parts["frozen_weights"] == 2 * sum(WEIGHTS)
    assert found.parts["adapter_weights"] == 4 * TRAINED
    # C and R in bf16, U in fp32, two lists of 8 indices in int64; q is 64 x 64, v is 32 x 64.
    buffers = [2 * (out * 8 + 8 * 64) + 4 * 8 * 8 + 2 * 8 * 8 for out in (64, 32)]
    assert found.parts["adapter_buffers"] == 2 * sum(buffers)
    assert found.parts["optimizer_state"] == 2 * 4 * TRAINED
    assert found.parts["fp32_masters"] == found.parts["reduce_buckets"] == 0
    assert found.phases["training"] == sum(found.parts.values()) == found.step_bytes


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_zero3_cuts_every_weight_with_its_padding(folder: Path, ranks: int) -> None:
    found = planned(folder, ranks=ranks, settings=zero(3))
    assert found.parts["frozen_weights"] == 2 * sum(-(-n // ranks) for n in WEIGHTS)
    slices = 8 * -(-96 // ranks)  # eight trained matrices of 96 elements
    assert found.parts["adapter_weights"] == found.parts["gradients"] == 2 * slices
    assert found.parts["fp32_masters"] == 4 * slices
    assert found.parts["optimizer_state"] == 2 * 4 * slices
    assert found.parts["reduce_buckets"] == 2 * 1000
    assert found.parts["persistent_weights"] == 0


def test_small_weights_stay_whole_below_the_threshold(folder: Path) -> None:
    found = planned(folder, ranks=2, settings=zero(3, stage3_param_persistence_threshold=64))
    assert found.parts["persistent_weights"] == 2 * 5 * NORM  # A and B have 96 elements


def test_zero2_keeps_weights_whole_and_cuts_the_optimizer(folder: Path) -> None:
    found = planned(folder, ranks=2, settings=zero(2))
    assert found.parts["frozen_weights"] == 2 * sum(WEIGHTS)
    assert found.parts["adapter_weights"] == 2 * TRAINED
    assert found.parts["optimizer_state"] == 2 * 4 * TRAINED // 2
    assert found.parts["fp32_masters"] == 4 * TRAINED // 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_4_bit_weights_and_their_constants(folder: Path, ranks: int) -> None:
    settings = zero(3) if ranks > 1 else None
    found = planned(folder, "backbone.quantization.kind=nf4", ranks=ranks, settings=settings)
    others = [HEADS, HEADS, *[NORM] * 5]
    packed = [n // 4 for n in LINEAR]  # numbers of two bytes, four weights in each
    assert found.parts["frozen_weights"] == 2 * sum(-(-n // ranks) for n in (*others, *packed))
    # A byte for 64 weights, a float for 256 of these, one offset, tables of 16 and of 256 floats.
    constants = sum(n // 64 + 4 + 4 + 4 * (16 + 256) for n in LINEAR)
    assert found.parts["quantization_constants"] == constants


def test_lora_has_no_buffers(folder: Path) -> None:
    found = planned(folder, f"adapter={json.dumps(LORA)}")
    assert found.trained_parameters == 2 * 4 * ((64 + 64) + (64 + 32))
    assert found.parts["adapter_buffers"] == 0


def test_8_bit_moments_of_large_matrices_only(folder: Path) -> None:
    large = ["adapter.init=orthogonal", "adapter.inner_rank=600", "training.optimizer=adamw_8bit"]
    count = 8 * 600
    found = planned(folder, *large)
    assert found.parts["optimizer_state"] == 8 * 2 * (count + 4 * -(-count // 256))
    assert planned(folder, "training.optimizer=adamw_8bit").parts["optimizer_state"] == 8 * TRAINED


def test_offloaded_weights_lie_in_host_memory(folder: Path) -> None:
    on_gpu = planned(folder, ranks=2, settings=zero(3), device="cuda")
    offloaded = planned(folder, ranks=2, settings=zero(3, offload_param={"device": "cpu"}), device="cuda")
    assert offloaded.parts["frozen_weights"] == 0 < on_gpu.parts["frozen_weights"]
    # Both ranks' slices, on one node.
    assert offloaded.host["offloaded_weights"] >= 2 * (sum(WEIGHTS) + TRAINED)
    assert on_gpu.host["offloaded_weights"] == 0


def test_checkpointing_trades_activations_for_time(folder: Path) -> None:
    plain, saving = planned(folder, "training.gradient_checkpointing=false"), planned(folder)
    assert saving.parts["activations"] < plain.parts["activations"]


def test_logits_are_those_of_one_chunk_of_tokens(folder: Path) -> None:
    """Twice the tokens cost twice the hidden states, but no more logits once a chunk is full."""
    wide = LlamaConfig(**{**tiny().to_dict(), "vocab_size": 100_000})
    sizes = []
    for batch in (16, 32):
        recipe = recipe_of(folder, f"training.micro_batch_size={batch}")
        found = plan(recipe, wide, device="cpu")
        sizes.append(found.parts["logits_and_loss"])
    assert 256 * 100_000 * 4 < sizes[0] < 256 * 100_000 * 16
    assert sizes[1] - sizes[0] < 0.1 * sizes[0]


def test_a_plan_is_read_back_from_json(folder: Path) -> None:
    found = planned(folder, ranks=2, settings=zero(3))
    assert Plan.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_step_sends_every_weight_it_lacks(folder: Path) -> None:
    found = planned(folder, "training.gradient_checkpointing=false", ranks=2, settings=zero(3))
    # Each rank lacks half of every frozen weight, in the forward and again in the backward pass.
    assert found.traffic["gather_weights"] <= 2 * 2 * sum(WEIGHTS) / 2 * 1.1
    assert found.traffic["gather_weights"] >= 2 * sum(WEIGHTS) / 2
    assert planned(folder).traffic == dict.fromkeys(found.traffic, 0)


@settings(max_examples=8, deadline=None)
@given(ranks=st.integers(2, 12))
def test_more_ranks_never_hold_more_between_steps(folder: Path, ranks: int) -> None:
    within_a_step = {"gathered_weights", "activations", "logits_and_loss", "backward_buckets"}
    few, many = (planned(folder, ranks=n, settings=zero(3)).parts for n in (ranks, ranks + 1))
    for part in few.keys() - within_a_step:
        assert many[part] <= few[part], part

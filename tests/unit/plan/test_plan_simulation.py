"""The simulated pass: against the real model's own allocations, and unrolled against every layer run."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from allocated import AllocatedPeak
from family_toys import BACKBONES, shrunken
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig

from secura_ds.adapter import SecuraConfig
from secura_ds.backbones import choose_attention, head, quantization_config, replace_linear
from secura_ds.backbones.adapter import adapter_config
from secura_ds.plan import Work, simulation
from secura_ds.plan.blueprint import constants, draw
from secura_ds.plan.simulation import Event, simulate
from secura_ds.recipe import Recipe, load_recipe
from secura_ds.sharding import keep_exact
from secura_ds.sharding.streaming import load_parameters

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "smollm2-135m.json"
FAMILIES = ("llama3.1-8b", "qwen2-7b", "gemma2-2b")
SMALL = [
    "adapter.selection=least",
    "adapter.cur_rank=8",
    "adapter.inner_rank=12",
    "backbone.dtype=bfloat16",
    "backbone.attention=auto",
]


def config_of(name: str, layers: int = 2) -> PreTrainedConfig:
    more = {"num_hidden_layers": layers, "hidden_size": 128, "intermediate_size": 384}
    config = BACKBONES[name].config
    if getattr(config, "layer_types", None):
        more["layer_types"] = config.layer_types[:layers]
    return shrunken(config, **more)


def recipe_of(*changes: str) -> Recipe:
    return load_recipe(RECIPE, [*SMALL, *changes])


def real_model(recipe: Recipe, config: PreTrainedConfig) -> torch.nn.Module:
    """What `draw` draws, with numbers in it; 4-bit where the recipe says so."""
    dtype = getattr(torch, recipe.backbone.dtype)
    kernel, _ = choose_attention(config, recipe.backbone.attention, dtype=recipe.backbone.dtype)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=kernel)
    if recipe.backbone.quantization is not None:
        values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        replace_linear(model, quantization_config(recipe.backbone))
        for _ in load_parameters(model, values.__getitem__, torch.device("cpu")):
            pass
        keep_exact(model)
    model.requires_grad_(False)
    adapter = adapter_config(recipe, config)
    if isinstance(adapter, SecuraConfig):
        adapter.init = "orthogonal"
    adapted = get_peft_model(model, adapter)
    adapted.enable_input_require_grads()
    return adapted.train()


def highest(events: list[Event]) -> int:
    level = peak = 0
    for event in events:
        peak = max(peak, level + event.peak)
        level += event.change
    return peak


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_a_drawn_model_is_the_real_one_tensor_by_tensor(name: str, weights: str) -> None:
    recipe = recipe_of(*(["backbone.quantization.kind=nf4"] if weights == "nf4" else []))
    drawn, real = draw(recipe, config_of(name), sharded=False), real_model(recipe, config_of(name))

    def facts(model: torch.nn.Module) -> dict[str, tuple[object, ...]]:
        found = {n: (p.nbytes, p.dtype, p.requires_grad) for n, p in model.named_parameters()}
        found |= {n: (b.nbytes, b.dtype, False) for n, b in model.named_buffers()}
        return found

    assert facts(drawn) == facts(real)
    assert all(tensor.device.type == "meta" for tensor in (*drawn.parameters(), *drawn.buffers()))
    assert [sum(c.nbytes for c in constants(p)) for p in drawn.parameters()] == [
        sum(c.nbytes for c in constants(p)) for p in real.parameters()
    ]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        ["adapter.smagnorm.apply=merge"],
        ["adapter.smagnorm.apply=forward"],
        ["adapter.smagnorm.apply=forward", "training.gradient_checkpointing=true"],
        ["adapter.smagnorm.apply=merge", "backbone.quantization.kind=nf4"],
        ['adapter={"method":"lora","rank":8,"target_modules":"all-linear"}'],
        ['adapter={"method":"dora","rank":8,"target_modules":["q_proj"]}'],
    ],
    ids=["merge", "forward", "checkpointing", "nf4", "lora", "dora"],
)
def test_a_pass_takes_what_the_allocator_hands_out(name: str, changes: list[str]) -> None:
    recipe, config = recipe_of(*changes), config_of(name, layers=4)
    work = Work(batch=3, length=160, learnt=300)
    checkpointing = recipe.training.gradient_checkpointing
    planned = highest(
        simulate(draw(recipe, config, sharded=False), work, device="cpu", checkpointing=checkpointing).events
    )
    model = real_model(recipe, config)
    base = model.get_base_model()
    head.add_summed_loss(base)
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(5, 500, (work.batch, work.length))
    mask = torch.ones_like(ids)
    mask[0, -20:] = 0
    targets = torch.full_like(ids, head.IGNORED)
    targets.view(-1)[: work.learnt] = 7

    def run() -> None:
        model(input_ids=ids, attention_mask=mask, targets=targets).backward()
        model.zero_grad(set_to_none=True)

    run()  # once, as the first pass makes what later ones find
    with AllocatedPeak() as measured:
        run()
    assert planned == pytest.approx(measured.bytes, rel=0.05)


@pytest.mark.parametrize(("name", "layers"), [("llama3.1-8b", 7), ("gemma2-2b", 8)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_few_layers_tell_of_all(
    monkeypatch: pytest.MonkeyPatch, name: str, layers: int, checkpointing: bool
) -> None:
    """Gemma's layers alternate, so that a period has two."""
    recipe, work = recipe_of("adapter.smagnorm.apply=forward"), Work(2, 64, 50)
    model = draw(recipe, config_of(name, layers), sharded=True)
    few = simulate(model, work, device="cpu", checkpointing=checkpointing).events
    monkeypatch.setattr(simulation, "representatives", lambda layers, _: list(range(len(layers))))
    every = simulate(model, work, device="cpu", checkpointing=checkpointing).events
    assert [(e.kind, e.module, e.phase) for e in few] == [(e.kind, e.module, e.phase) for e in every]
    assert highest(few) == pytest.approx(highest(every), rel=1e-3)


def test_layers_that_differ_are_all_run() -> None:
    recipe = recipe_of('adapter.exclude_modules=["layers.1.self_attn.q_proj"]')
    model = draw(recipe, config_of("llama3.1-8b", 7), sharded=True)
    layers = model.get_base_model().model.layers
    assert simulation.representatives(layers, None) == list(range(7))
    alike = draw(recipe_of(), config_of("llama3.1-8b", 7), sharded=True).get_base_model().model.layers
    assert simulation.representatives(alike, None) == [0, 1, 6]


def test_more_work_takes_more_and_offloading_less() -> None:
    recipe, config = recipe_of(), config_of("qwen2-7b", 6)
    model = draw(recipe, config, sharded=True)

    def peak(batch: int, length: int, **how: bool) -> int:
        work = Work(batch, length, batch * (length - 1))
        return highest(simulate(model, work, device="cuda", **how).events)

    assert peak(2, 64) < peak(4, 64) < peak(4, 128)
    offloaded = simulate(model, Work(4, 128, 500), device="cuda", offloading=True)
    assert highest(offloaded.events) < peak(4, 128) - offloaded.offloaded / 2
    assert peak(4, 128, checkpointing=True) < peak(4, 128)

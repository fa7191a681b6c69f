"""From each method's section to PEFT's configuration, the weights that full training takes, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calibration_toys import toy_llama
from method_toys import ADAPTERS, override
from peft import LoraConfig, OSFConfig
from training_toys import write_toy
from transformers import LlamaConfig

from secura_ds.adapter import SecuraConfig
from secura_ds.backbones import load_config
from secura_ds.backbones.adapter import adapter_config, refuse_stage, train_weights
from secura_ds.errors import UserError
from secura_ds.plan.blueprint import draw
from secura_ds.recipe import FullTraining, Recipe, load_recipe


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"), examples=4)


def recipe_of(toy: Path, *options: str) -> Recipe:
    return load_recipe(toy, options)


@pytest.mark.parametrize("method", [name for name in ADAPTERS if not name.startswith("full")])
def test_targets_are_the_familys_by_default(toy: Path, method: str) -> None:
    config = adapter_config(recipe_of(toy, override(method)), LlamaConfig())
    assert config is not None and set(config.target_modules or ()) == {"q_proj", "v_proj"}


def test_cabr_is_secura_without_its_norm(toy: Path) -> None:
    settings = '"cur_rank": 7, "inner_rank": 9, "strategy": "M1", "fold_every": 3, "scaling": 0.5'
    settings += ', "selection": "least"'
    configs = []
    for method in ("secura", "cabr"):
        recipe = recipe_of(toy, f'adapter={{"method": "{method}", {settings}}}')
        configs.append(adapter_config(recipe, LlamaConfig()))
    secura, cabr = configs
    assert isinstance(cabr, SecuraConfig) and cabr.apply == "never" and cabr.restraint is None
    assert secura is not None
    differing = {k for k, v in secura.to_dict().items() if cabr.to_dict()[k] != v}
    assert differing == {"smagnorm"}
    with pytest.raises(UserError, match="adapter.smagnorm from --set is no known key"):
        recipe_of(toy, f'adapter={{"method": "cabr", {settings}, "smagnorm": {{}}}}')


def test_cur_lora_is_drawn_and_trains_a_square(toy: Path) -> None:
    config = adapter_config(recipe_of(toy, override("cur-lora"), "training.seed=5"), LlamaConfig())
    assert isinstance(config, SecuraConfig)
    assert (config.selection, config.init, config.seed, config.apply) == ("sampled", "identity", 5, "never")
    assert (config.cur_rank, config.inner_rank) == (7, 7)
    assert config.rank_pattern == config.inner_rank_pattern == {"v_proj": 5}


def test_pefts_own_methods(toy: Path) -> None:
    corda = adapter_config(recipe_of(toy, override("corda")), LlamaConfig())
    assert isinstance(corda, LoraConfig) and corda.corda_config is not None
    assert (corda.init_lora_weights, corda.corda_config.corda_method) == ("corda", "kpm")
    osf = adapter_config(recipe_of(toy, 'adapter={"method": "osf"}'), LlamaConfig())
    assert isinstance(osf, OSFConfig) and osf.effective_rank == 0.5


def test_the_weights_that_full_training_takes() -> None:
    model = toy_llama().requires_grad_(False)
    train_weights(model, FullTraining(method="full"))
    assert all(p.requires_grad for p in model.parameters())
    some = FullTraining(method="full", target_modules="all-linear", exclude_modules=["up_proj"])
    train_weights(model, some)
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}
    with pytest.raises(UserError, match="match no module of the model"):
        train_weights(model, FullTraining(method="full", target_modules=["no_such"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["osf", "backbone.quantization.kind=nf4"], 'adapter.method is "osf", which takes the weights apart'),
        (["corda", "backbone.quantization.kind=nf4"], 'adapter.method is "corda", which moves a part'),
        (["full", "backbone.quantization.kind=nf4"], 'adapter.method is "full", which trains the weights'),
        (["cabr", "backbone.quantization.kind=nf4"], 'adapter.strategy is "M1", which rewrites the weights'),
        (["full"], 'adapter.method is "full" and backbone.dtype "bfloat16", in which small updates'),
        (["full", "backbone.dtype=float32", "training.save_merged=true"], "has nothing to merge"),
    ],
)
def test_what_does_not_go_together(toy: Path, options: list[str], message: str) -> None:
    method, *more = options
    with pytest.raises(UserError) as caught:
        recipe_of(toy, override(method), "backbone.dtype=bfloat16", *more)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("rank", ["0", "1.0", "-0.5", "true", '"half"', "null"])
def test_a_rank_to_keep_is_a_number_or_a_share(toy: Path, rank: str) -> None:
    with pytest.raises(
        UserError, match=r"adapter.effective_rank is .*: should be a whole number above 0, or"
    ):
        recipe_of(toy, f'adapter={{"method": "osf", "effective_rank": {rank}}}')


def test_nothing_is_excluded_from_everything(toy: Path) -> None:
    with pytest.raises(UserError, match="adapter.exclude_modules .*target_modules is null"):
        recipe_of(toy, 'adapter={"method": "full", "exclude_modules": ["up_proj"]}')


@pytest.mark.parametrize("method", ADAPTERS)
def test_methods_that_need_whole_weights_are_refused_under_zero3(toy: Path, method: str) -> None:
    recipe = recipe_of(toy, override(method), "training.deepspeed=zero3.json")
    refuse_stage(recipe, 2)
    if json.loads(override(method).removeprefix("adapter="))["method"] not in ("osf", "corda"):
        refuse_stage(recipe, 3)
        return
    with pytest.raises(UserError, match=r"zero3.json shards them \(ZeRO-3\): use deepspeed/zero2.json"):
        refuse_stage(recipe, 3)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('adapter.target_modules=["q_proj", "v_prj"]', 'target_modules has "v_prj", .*; did you mean v_proj'),
        (
            'adapter.exclude_modules=["layers.9.q_proj"]',
            'exclude_modules has "layers.9.q_proj", which matches',
        ),
        ('adapter.modules_to_save=["lm_haed"]', 'modules_to_save has "lm_haed", .*did you mean lm_head'),
        ('adapter.rank_pattern={"q_prooj": 3}', 'rank_pattern has "q_prooj", .*did you mean q_proj'),
    ],
)
def test_a_name_that_matches_no_module_is_refused(toy: Path, override: str, said: str) -> None:
    with pytest.raises(UserError, match=f"adapter.{said}"):
        draw(recipe_of(toy, override), load_config(recipe_of(toy).backbone), sharded=False)


def test_names_that_match_are_taken(toy: Path) -> None:
    options = [
        'adapter.target_modules=["q_proj", "layers.1.self_attn.v_proj"]',
        'adapter.exclude_modules=["layers.0.self_attn.q_proj"]',
        'adapter.modules_to_save=["lm_head"]',
        'adapter.rank_pattern={"layers.0.*": 3, "v_proj": 4}',
    ]
    model = draw(recipe_of(toy, *options), load_config(recipe_of(toy).backbone), sharded=False)
    assert {
        name.split(".secura_B")[0][-25:] for name, _ in model.named_parameters() if "secura_B" in name
    } == {
        "layers.1.self_attn.q_proj",
        "layers.1.self_attn.v_proj",
    }


def test_a_module_in_4_bits_cannot_be_trained_whole(toy: Path) -> None:
    four_bit = ["backbone.dtype=bfloat16", "backbone.quantization.kind=nf4"]
    recipe = recipe_of(toy, *four_bit, 'adapter.modules_to_save=["o_proj"]')
    with pytest.raises(UserError, match=r"adapter.modules_to_save matches .*o_proj, which is in 4 bits"):
        draw(recipe, load_config(recipe.backbone), sharded=False)

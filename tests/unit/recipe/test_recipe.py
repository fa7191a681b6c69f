from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from secura_ds.errors import UserError
from secura_ds.recipe import LoraAdapter, SecuraAdapter, load_recipe, recipe_schema


def _values() -> dict[str, Any]:
    return {
        "$schema": "recipe.schema.json",
        "name": "toy",
        "backbone": {"model": "embedded:smollm2-135m"},
        "adapter": {"method": "secura"},
        "data": {"sources": [{"path": "rows.jsonl"}]},
        "training": {"output_dir": "runs/toy", "learning_rate": 1e-3, "max_steps": 2},
    }


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(_values()))
    return path


def _problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    lines = str(caught.value).split("\n")
    assert all(line.endswith(f" ({path})") for line in lines)
    return [line.removesuffix(f" ({path})") for line in lines]


def test_defaults_and_paths(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    assert isinstance(loaded.adapter, SecuraAdapter)
    assert (loaded.adapter.cur_rank, loaded.adapter.inner_rank, loaded.adapter.smagnorm.eps) == (
        64,
        96,
        1e-10,
    )
    assert loaded.data.sources[0].path == str(recipe.parent / "rows.jsonl")
    assert loaded.resolve_path("rows.jsonl") == recipe.parent / "rows.jsonl"
    assert loaded.resolve_path("absent") == recipe.parent / "absent"


def test_resolved_recipe_loads_to_the_same(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = load_recipe(recipe, ["adapter.smagnorm.eps_relative=1.0"])
    elsewhere = tmp_path / "run" / "recipe.resolved.json"
    elsewhere.parent.mkdir()
    elsewhere.write_text(json.dumps(first.resolved()))
    assert load_recipe(elsewhere).resolved() == first.resolved()
    assert caplog.records == []


def test_a_file_of_the_current_folder_is_found_too(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path / "here")
    loaded = load_recipe(recipe, ["data.sources.0.path=mine.jsonl"])
    assert loaded.data.sources[0].path == str(tmp_path / "here" / "mine.jsonl")


def test_all_problems_are_reported_at_once(recipe: Path) -> None:
    values = _values()
    values["adapter"] |= {"cur_rnk": 8, "learning_rate": 1, "smagnorm": {"eps": 1.0, "eps_relative": 1.0}}
    values["backbone"] = {"model": "embedded:smolm", "dtype": "float32", "quantization": {"kind": "nf4"}}
    values["data"]["sources"] = [{"path": "absent.jsonl"}, {"hub": "a/b", "path": "rows.jsonl"}]
    values["training"] |= {"micro_batch_size": "four", "epochs": 1, "learning_rate": float("nan")}
    recipe.write_text(json.dumps(values))
    folder = recipe.parent
    assert _problems(recipe) == [
        'backbone.model is "embedded:smolm": should be one of embedded:smollm2-135m',
        'backbone.quantization is {"kind": "nf4"}: 4-bit weights compute in half precision: '
        'set backbone.dtype to "bfloat16"',
        "adapter.smagnorm.eps_relative is 1.0: exactly one of eps and eps_relative should be a number, "
        "the other null or left out",
        "adapter.cur_rnk is no known key; did you mean cur_rank?",
        "adapter.learning_rate is no known key; did you mean training.learning_rate?",
        f'data.sources.0.path is "absent.jsonl": no such file, looked in {folder} and in {Path.cwd()}',
        'data.sources.1.hub is "a/b": exactly one of path and hub should be given',
        "training.max_steps is 2: exactly one of epochs and max_steps should be given",
        'training.micro_batch_size is "four": should be a valid integer',
        "training.learning_rate is NaN: should be a finite number",
    ]


def test_rules_between_sections(recipe: Path) -> None:
    problems = _problems(
        recipe, "adapter.strategy=M1", "backbone.quantization.kind=nf4", "training.eval_steps=5", "name=a b"
    )
    assert problems[0] == "name is \"a b\" from --set: String should match pattern '^[\\w][\\w.-]*$'"
    assert problems[1].startswith(
        'adapter.strategy is "M1", which rewrites the weights, but backbone.quantization'
    )
    assert problems[2].startswith("training.eval_steps is set, but there is nothing to validate on")
    assert len(problems) == 3


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("training.lerning_rate=1", "{path} from --set is no known key; did you mean learning_rate?"),
        ("adapter.cur_rank=8.5", "{path} is 8.5 from --set: should be a valid integer"),
        ("adapter.cur_rank=true", "{path} is true from --set: should be a valid integer"),
        ("adapter.cur_rank=0", "{path} is 0 from --set: should be greater than 0"),
        (
            "adapter.method=lorra",
            '{path} is "lorra" from --set: should be one of "secura", "cabr", "cur-lora", "lora", "dora", '
            '"corda", "osf", "full"; did you mean lora?',
        ),
        (
            "adapter.target_modules=q_proj",
            '{path} is "q_proj" from --set: should be a list of module names, "all-linear" '
            "or null (the family's default)",
        ),
        ("backbone=3", "{path} is 3 from --set: should be an object"),
        ("evaluation.task.metric=bleu", "evaluation.task.path is missing; it has no default"),
        (
            "data.sources.0.split=test",
            '{path} is "test" from --set: only a hub data set has this, a file has none: leave it out',
        ),
        (
            "backbone.model=./absent",
            '{path} is "./absent" from --set: should be embedded:<name>, '
            "a hub id such as Qwen/Qwen2-7B-Instruct, or an existing folder",
        ),
        ("training", "--set training: expected a.b=value, for example --set training.learning_rate=1e-4"),
        ("=3", "--set =3: expected a.b=value, for example --set training.learning_rate=1e-4"),
        ("name.x=3", '--set name.x=3: name is "toy", which has no parts'),
        ("data.sources.1.path=x", "--set data.sources.1.path=x: data.sources has 1 entries, there is no '1'"),
    ],
)
def test_overrides_are_checked_alike(recipe: Path, override: str, problem: str) -> None:
    assert _problems(recipe, override) == [problem.replace("{path}", override.partition("=")[0])]


def test_overrides_are_json_or_bare_text(recipe: Path) -> None:
    loaded = load_recipe(
        recipe,
        [
            "training.learning_rate=1e-4",
            "adapter.target_modules=all-linear",
            'adapter.rank_pattern={"k_proj": 16}',
            "backbone.quantization.kind=nf4",
            'description="12"',
            "backbone.revision=main",
        ],
    )
    assert loaded.training.learning_rate == 1e-4
    assert loaded.adapter.target_modules == "all-linear"
    assert isinstance(loaded.adapter, SecuraAdapter) and loaded.adapter.rank_pattern == {"k_proj": 16}
    assert loaded.backbone.quantization is not None and loaded.backbone.quantization.double_quantization
    assert (loaded.description, loaded.backbone.revision) == ("12", "main")


def test_another_method_has_its_own_keys(recipe: Path) -> None:
    loaded = load_recipe(recipe, ['adapter={"method": "dora", "rank": 8}'])
    assert loaded.adapter == LoraAdapter(method="dora", rank=8)
    assert _problems(recipe, 'adapter={"method": "lora", "cur_rank": 8}') == [
        "adapter.cur_rank from --set is no known key; did you mean rank?"
    ]
    assert _problems(recipe, "backbone.learning_rate=1", "epochs=1") == [
        "backbone.learning_rate from --set is no known key; did you mean training.learning_rate?",
        "epochs from --set is no known key; did you mean training.epochs?",
    ]
    assert _problems(recipe, 'adapter={"method": "lora", "smagnorm": {}, "selection": "least"}') == [
        "adapter.smagnorm from --set is no known key; it belongs to secura, not to lora",
        "adapter.selection from --set is no known key; it belongs to secura, cabr, not to lora",
    ]


def test_settings_without_effect_are_warned_of(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_recipe(
            recipe,
            [
                "adapter.selection=least",
                'adapter.calibration.mode="null"',
                "adapter.smagnorm.apply=never",
                "adapter.smagnorm.steepness=4",
                "adapter.calibration.energy=0.5",
                "adapter.calibration.floor=0.2",
            ],
        )
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        'adapter.smagnorm has settings that have no effect with apply "never"',
        'adapter.calibration has no effect with selection "least"',
        'adapter.calibration.energy has no effect with mode "null"',
        'adapter.calibration.floor has no effect with mode "null"',
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"name": "x",\n oops}', ":2: not JSON"),
        (b'{"name": 1, "name": 2}', "the key 'name' is given twice in one object"),
        (b"[]", "expected a JSON object, found list"),
        (b'{"name": "\xff"}', "not UTF-8 text"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(text)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent.json: no such file"):
        load_recipe(tmp_path / "absent.json")


def test_schema_describes_every_key_and_forbids_others() -> None:
    schema = recipe_schema()
    parts = [schema, *(part for part in schema["$defs"].values() if part.get("type") == "object")]
    assert len(parts) > 10
    for part in parts:
        assert part["additionalProperties"] is False
        for key, value in part["properties"].items():
            assert "description" in value or "$ref" in value or key == "adapter", key
    assert schema["required"] == ["name", "backbone", "adapter", "data", "training"]


def test_schema_file_is_current() -> None:
    """After a change of the schema: make schema."""
    path = Path(__file__).parents[3] / "recipes" / "recipe.schema.json"
    assert json.loads(path.read_text()) == recipe_schema()

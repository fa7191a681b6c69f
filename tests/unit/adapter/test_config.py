"""What a configuration accepts, what it refuses, and what it looks like on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from secura_ds import SecuraConfig, SecuraModel, UserError
from secura_ds.sharding import Restraint


def test_defaults() -> None:
    config = SecuraConfig()
    assert (config.cur_rank, config.inner_rank, config.scaling, config.strategy) == (64, 96, 1.0, "M2")
    assert config.smagnorm == {"apply": "merge", "form": "update", "steepness": 6.0, "eps": 1e-10}
    assert config.calibration["mode"] == "null"
    assert config.restraint == Restraint(6.0, "update", 1e-10, None)


def test_relative_eps_takes_the_place_of_the_default() -> None:
    config = SecuraConfig(smagnorm={"eps_relative": 1.0})
    assert config.restraint == Restraint(6.0, "update", None, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection": "best"}, "selection is 'best': allowed are 'least', 'sampled', 'calibrated'"),
        ({"strategy": "M3"}, "strategy is 'M3': allowed are 'M2', 'M1'"),
        ({"cur_rank": 0}, "cur_rank is 0: an integer of at least 1"),
        ({"inner_rank": 1.5}, "inner_rank is 1.5: an integer of at least 1"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern['q_proj'] is -1: an integer of at least 1"),
        ({"fold_every": -1}, "fold_every is -1: an integer of at least 0"),
        ({"seed": "x"}, "seed is 'x': an integer of at least 0"),
        ({"scaling": float("nan")}, "scaling is nan: a finite number"),
        ({"smagnorm": {"aply": "merge"}}, "smagnorm has no setting 'aply'"),
        ({"smagnorm": {"apply": "always"}}, "smagnorm.apply is 'always'"),
        ({"smagnorm": {"eps": 1e-10, "eps_relative": 1.0}}, "set exactly one"),
        ({"smagnorm": {"steepness": 0}}, "smagnorm.steepness is 0: a number above 0"),
        ({"smagnorm": "forward"}, "smagnorm is 'forward': a mapping"),
        ({"calibration": {"mode": "zero"}}, "calibration.mode is 'zero'"),
        ({"calibration": {"energy": 1.0}}, "calibration.energy is 1.0: a number between 0 and 1"),
        ({"layers_pattern": "layers"}, "layers_pattern is set without layers_to_transform"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        SecuraConfig(**settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_saved_config_says_that_its_factors_are_saved(tmp_path: Path) -> None:
    config = SecuraConfig(target_modules=["v_proj", "q_proj"], smagnorm={"apply": "forward"})
    config.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "SECURA"
    assert saved["target_modules"] == ["q_proj", "v_proj"]
    assert saved["factors_saved"] is True
    assert config.factors_saved is False
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, SecuraConfig)
    assert loaded.smagnorm == config.smagnorm
    assert loaded.target_modules == {"v_proj", "q_proj"}


def test_unknown_saved_key_is_refused(tmp_path: Path) -> None:
    SecuraConfig().save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cur_rnk": 3}))
    with pytest.raises(UserError, match="unknown keys \\['cur_rnk'\\]"):
        SecuraConfig.from_pretrained(str(tmp_path))


def test_registered_with_peft() -> None:
    assert PEFT_TYPE_TO_TUNER_MAPPING["SECURA"] is SecuraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["SECURA"] == "secura_"

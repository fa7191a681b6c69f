"""The merged checkpoint of a live run on two ranks, byte for byte that of the offline merge."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import export_toys
import pytest
from training_toys import quiet_environment

from secura_ds.checkpoint_files import open_checkpoint

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import export_worker as worker  # noqa: E402

# One run of the launcher serves every test here.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = export_toys.write_export_toy(tmp_path_factory.mktemp("toy"))
    settings = json.loads((recipe.parent / "zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 10**6
    (recipe.parent / "zero3-persistent.json").write_text(json.dumps(settings))
    return recipe


@pytest.fixture(scope="module")
def found(toy: Path) -> dict[str, Any]:
    """What the main rank has found, from one run of the launcher."""
    result = toy.parent / "result.json"
    launcher = str(Path(sys.executable).parent / "deepspeed")
    port = str(41000 + os.getpid() % 20000)
    done = subprocess.run(
        [launcher, "--num_accelerators", "2", "--master_port", port, worker.__file__, str(toy), str(result)],
        cwd=toy.parent,
        env=quiet_environment(),
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert result.is_file(), done.stdout[-4000:] + done.stderr[-4000:]
    return dict(json.loads(result.read_text()))


@pytest.mark.parametrize(("name", "options"), worker.CASES.items())
def test_the_files_are_those_of_the_offline_merge(
    toy: Path, found: dict[str, Any], name: str, options: list[str]
) -> None:
    assert found[name]["merged"] == str(toy.parent / name / "merged")
    assert export_toys.differences(toy.parent, name, options) == []
    report = json.loads((toy.parent / name / "merge.json").read_text())
    assert report == json.loads((toy.parent / name / "merged" / "merge.json").read_text())
    assert report["max_logit_gap"] is not None and report["check_skipped"] is None


def test_no_rank_holds_more_than_one_weight(toy: Path, found: dict[str, Any]) -> None:
    tensors = open_checkpoint(toy.parent / "backbone").tensors
    largest = max(tensors[name].shape[0] * tensors[name].shape[1] for name in tensors if "_proj" in name)
    assert found["fp32-forward-all"] == {
        "merged": str(toy.parent / "fp32-forward-all" / "merged"),
        "whole": largest,
        "gathered": 14,
    }
    # Tensors that training does not change are not moved between ranks; 4-bit ones are, adapted or not.
    assert (found["bf16-head"]["gathered"], found["nf4"]["gathered"]) == (4, 14)


def test_a_full_disk_stops_both_ranks_and_the_next_run_goes_on(toy: Path, found: dict[str, Any]) -> None:
    first, second = found["full"]["messages"]
    assert first == second and "is full: free some space and run again" in first and "\n" not in first
    assert "merged.partial" in found["full"]["left"] and "merged" not in found["full"]["left"]
    assert "adapter" in found["full"]["left"] and found["full"]["shards"] == 2
    assert found["full"]["merged"] == str(toy.parent / "full" / "merged")
    report = json.loads((toy.parent / "full" / "merge.json").read_text())
    shards = sorted(open_checkpoint(toy.parent / "backbone").files, key=lambda file: file.path.name)
    assert report["resumed_bytes"] == sum(file.size for file in shards[:2])
    assert export_toys.differences(toy.parent, "full", []) == []


def test_a_signal_on_one_rank_stops_the_export_of_both(toy: Path, found: dict[str, Any]) -> None:
    assert found["signal"]["first"] == ["interrupted", signal.SIGTERM, None]
    assert found["signal"]["then"] == ["finished", 3, str(toy.parent / "signal" / "merged")]
    assert json.loads((toy.parent / "signal" / "merge.json").read_text())["resumed_bytes"] > 0
    assert export_toys.differences(toy.parent, "signal", []) == []

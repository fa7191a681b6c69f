"""What the job scripts make of a recipe and of Slurm's variables; no Slurm is needed."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from training_toys import REPOSITORY

from secura_ds.errors import UserError
from secura_ds.stopping import REQUEUE

SLURM = REPOSITORY / "launch" / "slurm"
SCRIPTS = sorted(path.name for path in SLURM.glob("*.sbatch"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"slurm_{name}", SLURM / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


node, submit = load("node"), load("submit")
TASK = {"SLURM_JOB_ID": "41234", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "2"}


def test_ranks_of_the_second_node() -> None:
    first, second = node.rank_environments({**TASK, "MASTER_ADDR": "head"})
    shared = {"MASTER_ADDR": "head", "MASTER_PORT": "11234", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert first == {**shared, "RANK": "2", "LOCAL_RANK": "0"}
    assert second == {**shared, "RANK": "3", "LOCAL_RANK": "1"}


def test_ranks_that_were_asked_for() -> None:
    assert len(node.rank_environments({**TASK, "MASTER_ADDR": "head", "RANKS_PER_NODE": "5"})) == 5
    without = {key: value for key, value in TASK.items() if key != "SLURM_GPUS_ON_NODE"}
    assert [own["RANK"] for own in node.rank_environments({**without, "MASTER_ADDR": "head"})] == ["1"]
    with pytest.raises(SystemExit, match="RANKS_PER_NODE is 'two'"):
        node.rank_environments({**TASK, "RANKS_PER_NODE": "two"})


def test_jobs_on_one_node_meet_at_different_ports() -> None:
    ports = {
        node.rank_environments({**TASK, "SLURM_JOB_ID": str(job), "MASTER_ADDR": "head"})[0]["MASTER_PORT"]
        for job in range(700_000, 720_000)
    }
    assert len(ports) == 20_000
    assert all(10_000 <= int(port) < 30_000 for port in ports)


def test_the_first_node_is_the_address_where_its_name_is_known() -> None:
    task = {**TASK, "SLURM_LAUNCH_NODE_IPADDR": "192.0.2.1"}
    assert node.rank_environments({**task, "SECURA_NODES": "localhost b"})[0]["MASTER_ADDR"] == "localhost"
    unknown = {**task, "SECURA_NODES": "no-such-host.invalid b"}
    assert node.rank_environments(unknown)[0]["MASTER_ADDR"] == "192.0.2.1"


def ranks(*scripts: str) -> list[subprocess.Popen[bytes]]:
    return [subprocess.Popen([sys.executable, "-c", script]) for script in scripts]


def test_the_status_of_a_node_is_that_of_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert node.REQUEUE == REQUEUE
    assert node.wait(ranks("", "")) == 0
    saved = f"import sys; sys.exit({REQUEUE})"
    assert node.wait(ranks(saved, saved)) == REQUEUE
    assert node.wait(ranks("import time, sys; time.sleep(0.5); sys.exit(2)", saved)) == 2
    assert node.wait(ranks("import os; os.kill(os.getpid(), 9)", saved)) == 128 + signal.SIGKILL
    monkeypatch.setattr(node, "OWN_END", 0.3)
    began = time.monotonic()
    assert node.wait(ranks("import sys; sys.exit(3)", "import time; time.sleep(60)")) == 3
    monkeypatch.setattr(node, "LAST_WORDS", 0.3)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    assert node.wait(ranks("import sys, time; time.sleep(1); sys.exit(3)", deaf)) == 3
    assert time.monotonic() - began < 20


def test_a_node_outside_of_a_job_says_what_to_do() -> None:
    bare = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    done = subprocess.run(
        [sys.executable, str(SLURM / "node.py"), "x"], env=bare, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: node.py is started by srun in a job: sbatch launch/slurm/train.sbatch\n"


def test_a_dry_run_prints_a_script_that_bash_can_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = str(REPOSITORY / "recipes" / "llama3-8b.json")
    options = ["--nodes", "2", "--partition", "gpu", "--time", "1-00:00:00", "--container-image", "a b.sif"]
    passed = ["--set", "training.learning_rate=1e-4", "--overwrite"]
    assert submit.main([recipe, *options, "--dry-run", "--", *passed]) == 0
    script = capsys.readouterr().out
    lines = script.splitlines()
    for line in ("--nodes=2", "--partition=gpu", "--time=1-00:00:00", "--signal=USR1@300", "--requeue"):
        assert f"#SBATCH {line}" in lines
    assert "CONTAINER_IMAGE='a b.sif'" in lines
    assert "##SBATCH --account=" in lines
    assert lines.index("set -- recipes/llama3-8b.json --set training.learning_rate=1e-4 --overwrite") > 0
    (tmp_path / "script").write_text(script)
    assert subprocess.run(["bash", "-n", str(tmp_path / "script")], check=False).returncode == 0


def test_a_recipe_of_task_sequences_has_its_own_job(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(REPOSITORY / "recipes" / "continual" / "smollm2-two-tasks.json")
    assert submit.main([recipe, "--nodes", "3", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "#SBATCH --job-name=secura-continual" in lines and "#SBATCH --nodes=3" in lines
    assert "set -- recipes/continual/smollm2-two-tasks.json" in lines
    assert 'run_on_nodes launch/continual.py "$@"' in lines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--partition", "a b"], "--partition is 'a b': Slurm takes no spaces there"),
        (["--account", ""], "--account is '': give text"),
        (["--python", "a\nb"], "give text without line breaks"),
        (["--", "--set", "training.learnin_rate=1"], "did you mean learning_rate?"),
    ],
)
def test_what_cannot_be_submitted_is_refused(options: list[str], message: str) -> None:
    recipe = str(REPOSITORY / "recipes" / "llama3-8b.json")
    with pytest.raises(UserError, match=re.escape(message)):
        submit.main([recipe, "--dry-run", *options])


def test_without_slurm_submitting_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="sbatch cannot be run .*: submit on a machine of the cluster"):
        submit.main([str(REPOSITORY / "recipes" / "llama3-8b.json")])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_job_script_names_nothing_of_one_site(name: str) -> None:
    text = (SLURM / name).read_text()
    assert subprocess.run(["bash", "-n", str(SLURM / name)], check=False).returncode == 0
    assert (
        "#SBATCH --requeue" in text
        and "#SBATCH --signal=USR1@" in text
        and "#SBATCH --open-mode=append" in text
    )
    assert "##SBATCH --partition=\n##SBATCH --account=\n" in text
    for variable in ("PYTHON", "CONTAINER_IMAGE", "MAX_RESTARTS", "LOG_FOLDER"):
        assert re.search(rf'^{variable}="\$\{{{variable}:-', text, re.MULTILINE)
    # Slurm reads its lines only up to the first command.
    before, _, after = text.partition("\nPYTHON=")
    assert before and "#SBATCH" not in after


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("", ["python3", "launch/merge.py", "--out", "x"]),
        (
            "images/secura.sif",
            ["apptainer", "exec", "--nv", "images/secura.sif", "python", "launch/merge.py"],
        ),
        ("registry/secura:1", ["--container-image=registry/secura:1", "python", "launch/merge.py"]),
    ],
)
def test_a_step_runs_in_the_container_that_was_asked_for(
    tmp_path: Path, image: str, expected: list[str]
) -> None:
    """With commands of Slurm's names that only say how they were called."""
    for command, body in {"srun": 'printf "%s\\n" "$@"', "scontrol": "echo n1"}.items():
        (tmp_path / command).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / command).chmod(0o755)
    (tmp_path / "launch").symlink_to(REPOSITORY / "launch")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_SUBMIT_DIR": str(tmp_path)}
    own = {"CONTAINER_IMAGE": image, "PYTHON": "python3", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(SLURM / "merge.sbatch"), "--out", "x"],
        env={**os.environ, **job, **own}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = iter(done.stdout.splitlines())
    assert all(word in words for word in expected), done.stdout

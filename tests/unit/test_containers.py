"""The containers agree with what CI runs; what is shell in this project passes its checkers."""

from __future__ import annotations

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DOCKERFILES = {path.name: path.read_text() for path in sorted((ROOT / "docker").glob("Dockerfile*"))}
PYTHONS = {"python:3.11-slim-bookworm": "3.11", "nvidia/cuda:13.0.1-devel-ubuntu24.04": "3.12"}
SLURM = sorted((ROOT / "launch/slurm").glob("*.s*"))
SHELL = [*SLURM, *sorted((ROOT / "docker").glob("*-packages")), ROOT / ".ci/run"]


@pytest.fixture(scope="module")
def settings() -> ConfigParser:
    found = ConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {_normal(name): version for name, version in pairs}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def commands(text: str) -> list[str]:
    """The RUN instructions of a Dockerfile, each on one line."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [line.removeprefix("RUN ") for line in joined.splitlines() if line.startswith("RUN ")]


def test_every_range_of_setup_cfg_holds_its_pin(settings: ConfigParser, pins: dict[str, str]) -> None:
    extras = settings["options.extras_require"]
    lines = f"{settings['options']['install_requires']}\n{extras['dev']}".split("\n")
    checked = [Requirement(line) for line in lines if line]
    assert len(checked) > 25
    outside = [str(one) for one in checked if not one.specifier.contains(pins[_normal(one.name)])]
    assert outside == []


@pytest.mark.parametrize("name", DOCKERFILES)
def test_versions_agree(name: str, settings: ConfigParser, pins: dict[str, str]) -> None:
    text = DOCKERFILES[name]
    assert f'image.version="{settings["metadata"]["version"]}"' in text
    (base,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
    python = PYTHONS[base]
    assert SpecifierSet(settings["options"]["python_requires"]).contains(f"{python}.0")
    assert f"Python :: {python}" in settings["metadata"]["classifiers"]
    for package, version in re.findall(r"([\w-]+)==([\w.]+)", text):
        assert pins[_normal(package)] == version


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_set_up_by_the_commands_of_ci(name: str) -> None:
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci/run").read_text()
    text = DOCKERFILES[name]
    assert "make setup" in commands(text)
    targets = set(re.findall(r"\bmake (\w+)", text)) | set(re.findall(r'"make", "(\w+)"', text))
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        assert re.search(rf"\bmake {target}$", ci, re.MULTILINE), target
    # What else is installed comes under the same constraints, from extras that exist.
    pip = [command for command in commands(text) if "pip install" in command]
    assert all("--constraint constraints.txt" in command for command in pip)
    assert all("'.[flash]'" in command for command in pip)
    assert "sh docker/system-packages" in makefile and "sh /tmp/system-packages" in commands(text)[0]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_pinned_small_and_without_root(name: str) -> None:
    text = DOCKERFILES[name]
    (base,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
    assert ":" in base and not base.endswith(":latest")
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == "1001"
    assert "useradd --uid 1001" in text and text.index("USER 1001") < text.index("COPY --chown=1001 . .")
    assert "PIP_NO_CACHE_DIR=1" in text and "rm -rf /tmp/system-packages /var/lib/apt/lists/*" in text


def test_the_context_holds_no_secret_and_nothing_large() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", ".env*", "**/.netrc", "**/*.pem", "**/*.key"} <= set(ignored)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_passes(name: str) -> None:
    done = subprocess.run(
        [str(BIN / "hadolint"), str(ROOT / "docker" / name)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_shellcheck_passes() -> None:
    assert len(SHELL) == 7
    done = subprocess.run(
        [str(BIN / "shellcheck"), "--external-sources", *map(str, SHELL)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")

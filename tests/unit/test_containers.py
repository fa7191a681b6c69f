"""The containers agree with what CI runs; what is shell in this project passes its checkers."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DOCKERFILES = {path.name: path.read_text() for path in sorted((ROOT / "docker").glob("Dockerfile*"))}
PYTHONS = {"python:3.11.14-slim-bookworm": "3.11", "nvidia/cuda:13.0.3-devel-ubuntu24.04": "3.12"}
SLURM = sorted((ROOT / "launch/slurm").glob("*.s*"))
# What torch's wheels of a version were built with, by their metadata: its cuda-toolkit.
CUDA = {"2.13.0": "13.0.3"}
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


def values(text: str, instruction: str) -> list[str]:
    """What follows each instruction of a kind in a Dockerfile, each on one line."""
    joined = re.sub(r"\\\n\s*", "", text)
    return re.findall(rf"^{instruction} (.+)$", joined, re.MULTILINE)


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
    flash = Requirement(settings["options.extras_require"]["flash"].strip())
    for package, version in re.findall(r"([\w-]+)==([\w.]+)", text):
        if package == flash.name:  # which no check ran with, so constraints.txt does not have it
            assert flash.specifier.contains(version)
        else:
            assert pins[_normal(package)] == version


def test_torch_and_cuda_are_those_of_the_wheels(pins: dict[str, str]) -> None:
    cuda = CUDA[pins["torch"]]
    assert values(DOCKERFILES["Dockerfile"], "FROM") == [f"nvidia/cuda:{cuda}-devel-ubuntu24.04"]
    assert f"the libraries of CUDA {cuda}," in DOCKERFILES["Dockerfile"]
    text = DOCKERFILES["Dockerfile.cpu"]
    assert f"torch, {pins['torch']}+cpu, " in text and f"with CUDA, {pins['torch']}, " in text
    # The one registry of packages that is named, and it can be another: it is an argument.
    assert values(text, "ARG") == ["PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"]
    assert text.index("ARG PIP_EXTRA_INDEX_URL") < text.index("RUN make setup")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_set_up_by_the_commands_of_ci(name: str) -> None:
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci/run").read_text()
    text = DOCKERFILES[name]
    assert "make setup" in values(text, "RUN")
    targets = set(re.findall(r"\bmake (\w+)", text)) | set(re.findall(r'"make", "(\w+)"', text))
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        assert re.search(rf"\bmake {target}$", ci, re.MULTILINE), target
    # What else is installed comes under the same constraints, from extras that exist.
    pip = [command for command in values(text, "RUN") if "pip install" in command]
    assert all("--constraint constraints.txt" in command for command in pip)
    assert all("--no-build-isolation flash-attn==" in command for command in pip)
    assert len(pip) == (name == "Dockerfile")
    assert "sh docker/system-packages" in makefile and "sh /tmp/system-packages" in values(text, "RUN")[0]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_pinned_small_and_without_root(name: str) -> None:
    text = DOCKERFILES[name]
    (base,) = values(text, "FROM")
    assert re.search(r":\d+\.\d+\.\d+-", base)
    assert "latest" not in text and "sudo" not in text and len(values(text, "CMD")) == 1
    assert values(text, "USER")[-1] == "1001"
    assert "useradd --uid 1001" in text and text.index("USER 1001") < text.index("COPY --chown=1001 . .")
    assert "PIP_NO_CACHE_DIR=1" in text and "rm -rf /tmp/system-packages /var/lib/apt/lists/*" in text


@pytest.mark.parametrize("name", DOCKERFILES)
def test_every_cache_is_in_the_volume_and_open_to_any_user(name: str) -> None:
    """Docker makes a volume's folder for root where the image has none, and few users may enter a home."""
    text = DOCKERFILES[name]
    assert values(text, "VOLUME") == ["/cache"]
    assert values(text, "RUN")[0].endswith(" --mode 1777 /cache /opt/secura_ds/runs")
    caches = dict(re.findall(r"(\w*(?:CACHE|HF)_\w+|SECURA_CACHE)=(/\S+)", "\n".join(values(text, "ENV"))))
    assert {"XDG_CACHE_HOME", "HF_HOME", "SECURA_CACHE"} <= set(caches)
    assert all(place.split("/")[1] == "cache" for place in caches.values())


@pytest.fixture(scope="module")
def kept() -> Callable[[str], bool]:
    """Whether a build sees a path: no pattern of .dockerignore meets it or a folder above it."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert not any(line.startswith("!") or "?" in line or "[" in line for line in lines)

    def regex(pattern: str) -> str:
        whole = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        return f"{whole}(?:/.*)?"

    ignored = re.compile("|".join(map(regex, lines)))
    return lambda path: ignored.fullmatch(path) is None


def test_the_context_holds_no_secret_and_nothing_large(kept: Callable[[str], bool]) -> None:
    folders = [".git/config", ".venv/bin/python", "runs/a/run.json", "logs/a", "merged/model.safetensors"]
    waste = ["tests/__pycache__/x.pyc", ".mypy_cache/x", "recipes/.cache/x", "secura.sif", "a/b.sqsh"]
    names = [".env", ".env.local", ".netrc", ".pypirc", "token", "hub.token", "a.pem", "a.key", "id_rsa"]
    secrets = [*names, *(f"recipes/{name}" for name in names), ".ssh/x", ".huggingface/x", ".docker/x"]
    assert [path for path in [*folders, *waste, *secrets] if kept(path)] == []


def test_the_context_holds_what_the_set_up_and_the_tests_read(kept: Callable[[str], bool]) -> None:
    files = ["Makefile", "setup.cfg", "constraints.txt", ".ci/run", ".dockerignore", "README.md", "LICENSE"]
    for folder in ("secura_ds", "launch", "recipes", "benchmarks", "docker", "docs", "tests"):
        found = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        files += [str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts]
    assert len(files) > 200 and "secura_ds/report/templates/report.html" in files
    assert [path for path in files if not kept(path)] == []


def test_the_guide_names_images_by_this_version(settings: ConfigParser) -> None:
    version = settings["metadata"]["version"]
    texts = [(ROOT / "docker/README.md").read_text(), *DOCKERFILES.values()]
    images = [image for text in texts for image in re.findall(r"\bsecura_ds(?::[\w.-]+)", text)]
    assert {image.removesuffix("-cpu") for image in images} == {f"secura_ds:{version}"} and len(images) > 6
    assert all((ROOT / path).is_file() for path in re.findall(r"--file (\S+)", "\n".join(texts)))


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_passes(name: str) -> None:
    done = subprocess.run(
        [str(BIN / "hadolint"), str(ROOT / "docker" / name)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_shellcheck_passes() -> None:
    assert len(SHELL) == 8
    done = subprocess.run(
        [str(BIN / "shellcheck"), "--external-sources", *map(str, SHELL)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")

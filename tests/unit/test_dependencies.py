from __future__ import annotations

import ast
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[2]
OWN = {"secura_ds", "launch", *(path.stem for path in (ROOT / "benchmarks").rglob("*.py"))}
INSTALLED_AS = {"yaml": "PyYAML"}


def _imported() -> set[str]:
    """Top-level names that our modules import and that are neither ours nor Python's own."""
    names: set[str] = set()
    for folder in ("secura_ds", "launch", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names.update(alias.name.split(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names.add(node.module.split(".")[0])
    return {INSTALLED_AS.get(name, name) for name in names - OWN - set(sys.stdlib_module_names)}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_imported_package_is_declared_and_pinned() -> None:
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    lines = settings["options"]["install_requires"].split()
    declared = {_normal(re.split(r"[<>=]", line)[0]) for line in lines}
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {_normal(line.split("==")[0]) for line in pins if "==" in line}
    imported = {_normal(name) for name in _imported()}
    assert len(imported) > 15
    assert imported - declared == set()
    assert declared - pinned == set()

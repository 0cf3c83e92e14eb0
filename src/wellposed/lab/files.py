"""Files that are either old or new, never half written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


class WriteError(RuntimeError):
    """A file cannot be written; its old content is intact."""


def write_atomically(path: str | Path, text: str) -> Path:
    """Write text so that a kill or a full disk leaves the old file whole.

    Raises:
        WriteError: saying why.

    Example:
        >>> import tempfile
        >>> write_atomically(Path(tempfile.mkdtemp()) / "a.txt", "new").read_text()
        'new'
    """
    path = Path(path)
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}; its old content is intact") from error
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)
    return path

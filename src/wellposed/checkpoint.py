"""Checkpoints that survive a kill while they are written, and random states that continue bit for bit."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read, or continued by this run."""


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write `state` so that `path` holds either the old checkpoint or the whole new one, never half of it.

    Raises:
        CheckpointError: if it cannot be written (a full disk, a missing permission); the old one is intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"fit: cannot write the checkpoint {path}: {error}; the previous checkpoint is intact"
        ) from error
    finally:
        Path(name).unlink(missing_ok=True)


def load_checkpoint(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint and check that it belongs to a run with the same `expected` description.

    Raises:
        CheckpointError: if the file is damaged, or what differs from this run.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(f"fit: {path} is not a readable checkpoint ({error}); delete it to start over") from error
    for key, value in expected.items():
        if state["run"].get(key) != value:
            raise CheckpointError(
                f"fit: the checkpoint {path} belongs to a run with {key}={state['run'].get(key)!r}, this one has "
                f"{key}={value!r}; pass another checkpoint= or delete it"
            )
    return state


def random_state() -> dict[str, Any]:
    """The state of every global random generator that training may use."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Continue from what `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])

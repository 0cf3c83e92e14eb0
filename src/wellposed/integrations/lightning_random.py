"""Random states in a Lightning checkpoint: plain values, one for each process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..checkpoint import random_state, restore_random_state
from ..loading import distributed, rank


def random_states() -> list[dict[str, Any]]:
    """The state of every global random generator, in each process; all of them must call it.

    Tensors and numbers alone, so that `torch.load(weights_only=True)` reads it.

    Example:
        >>> states = random_states()
        >>> first = torch.rand(1)
        >>> restore_random_states(states)
        >>> bool(torch.rand(1) == first)
        True
    """
    state = random_state()
    kind, words, *rest = state["numpy"]
    state["numpy"] = [kind, torch.from_numpy(words.astype(np.int64)), *rest]
    if not distributed():
        return [state]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, state)
    return found


def restore_random_states(states: list[dict[str, Any]]) -> None:
    """Continue from `random_states`; with another number of processes, each from the first one's."""
    processes = dist.get_world_size() if distributed() else 1
    state = dict(states[rank() if len(states) == processes else 0])
    kind, words, *rest = state["numpy"]
    state["numpy"] = (kind, words.numpy().astype(np.uint32), *rest)
    restore_random_state(state)

"""`regularizer.pt`: what a checkpoint folder of a Hugging Face trainer lacks for an exact resume of a method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..batching import unwrap
from ..checkpoint import CheckpointError, save_atomically
from ..loading import rank
from ..regularizer import Regularizer, leaves
from .peft_models import is_peft

FILE = "regularizer.pt"
_PER_RANK = ("generator", "logged")
_PROBES = 32


def method_names(regularizer: Regularizer) -> list[str]:
    """Class names of the methods, by which a checkpoint is known to be of the same run."""
    return [type(part).__name__ for part in leaves([regularizer])]


def save_regularizer(folder: Path, state: dict[str, Any]) -> None:
    """Write the state: all of it from the first rank, random numbers and pending logs of every rank.

    Raises:
        CheckpointError: if it cannot be written.
    """
    if rank() == 0:
        save_atomically(state, folder / FILE)
    else:
        save_atomically({name: state[name] for name in _PER_RANK}, folder / f"rank{rank()}_{FILE}")


def load_regularizer(folder: Path, methods: list[str]) -> dict[str, Any]:
    """Read what `save_regularizer` wrote, and check that it is of a run with the same methods.

    Raises:
        CheckpointError: if the folder holds no such file, a damaged one, or that of other methods.
    """
    path = folder / FILE
    if not path.exists():
        raise CheckpointError(
            f"resume_from_checkpoint: {folder} holds no {FILE}, so it was written without a regularizer (or with "
            "save_only_model=True) and cannot be continued exactly; start anew from its weights instead"
        )
    state = _read(path)
    if state["methods"] != methods:
        raise CheckpointError(
            f"resume_from_checkpoint: {folder} belongs to a run with {state['methods']}, this one has {methods}"
        )
    mine = folder / f"rank{rank()}_{FILE}"
    if rank() > 0 and mine.exists():
        state |= _read(mine)
    return state


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(f"resume_from_checkpoint: {path} cannot be read ({error})") from error
    return state


def parameter_probe(model: nn.Module) -> dict[str, Tensor]:
    """A few entries of every parameter, by which a checkpoint is seen to have been restored; of adapters alone under PEFT.

    Example:
        >>> {name: len(value) for name, value in parameter_probe(nn.Linear(20, 5)).items()}
        {'weight': 34, 'bias': 5}
    """
    named = unwrap(model).named_parameters()
    chosen = {name: p for name, p in named if p.requires_grad or not is_peft(model)}
    return {name: p.detach().flatten()[:: max(1, p.numel() // _PROBES)].cpu().clone() for name, p in chosen.items()}


def check_probe(folder: Path, model: nn.Module, probe: dict[str, Tensor]) -> None:
    """Refuse to go on from weights that are not those of the checkpoint.

    The trainer restores a model by the names of its tensors, and only warns of what it has not found. Names that a method
    makes in `attach` must be there, too.

    Raises:
        CheckpointError: naming a parameter.
    """
    found = parameter_probe(model)
    for name, value in probe.items():
        if name not in found or not torch.equal(found[name], value):
            raise CheckpointError(
                f"resume_from_checkpoint: {name!r} was not restored from {folder}; build the model and the regularizer as "
                "in the run that wrote it"
            )


def unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the place of tensors that share memory with an earlier one: tied weights under names of a method's own.

    Example:
        >>> tied = unshared({"a": (weight := torch.zeros(2)), "b": weight})
        >>> tied["a"].data_ptr() == tied["b"].data_ptr()
        False
    """
    seen: set[tuple[int, torch.device]] = set()
    found = {}
    for name, tensor in state.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.device)
        found[name] = tensor.clone() if place in seen and tensor.numel() else tensor
        seen.add(place)
    return found

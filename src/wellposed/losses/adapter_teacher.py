"""The pretrained model as teacher of its own low-rank adaptation: one model instead of two, and exact under PiSSA.

PiSSA replaces the base weights: what remains when its adapter is switched off is NOT the pretrained model. The adapter's
first factors, kept, give it back: `W_residual + s B_0 A_0 = W`.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ..batching import unwrap
from ..step import Step
from .adapter_layers import (
    acting_adapters,
    carries_weights,
    disabled,
    other_trainable,
    refuse_dropped_weights,
    replaced_base,
)


class AdapterTeacher(nn.Module):
    """What a consistency term asks for the pretrained model's logits. Subclasses say where that model comes from.

    A teacher's tensors are buffers: they come back with the state of the method that holds it, so that a resumed run has
    the same teacher.
    """

    requires: frozenset[str] = frozenset()

    def attach(self, model: nn.Module) -> None:
        """Look at the model before training, with its adapters in place."""

    def logits(self, step: Step) -> Tensor:
        """The teacher's logits for the step's inputs, in evaluation mode and without gradient."""
        raise NotImplementedError

    def _read(self, step: Step, outputs: Any) -> Tensor:
        return dataclasses.replace(step, outputs=outputs).logits


class InitialAdapterTeacher(AdapterTeacher):
    """The model as it was when training began: its adapters' first factors, on the present frozen weights.

    Costs the memory of what trains, not of a second model. Whatever else trains (a head) and the statistics of
    normalisation layers are kept, too. A head that starts from random numbers makes a random teacher: fit it first, with
    the rest frozen.

    Raises:
        ValueError: at `attach`, without adapters, with merged ones, or with dropout on PiSSA's; in use, if a parameter
            trains that was frozen at the start.
        RuntimeError: under FSDP, which spreads the factors over the ranks.

    Example:
        >>> import torch
        >>> from wellposed.weights.low_rank import add_low_rank
        >>> pretrained = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> model = copy.deepcopy(pretrained)
        >>> _ = add_low_rank(model, rank=1, init="pissa")
        >>> teacher = InitialAdapterTeacher()
        >>> teacher.attach(model)
        >>> _ = model[0].lora_A.data.fill_(9.0)
        >>> x = torch.ones(1, 3)
        >>> torch.allclose(teacher.logits(Step(model, inputs=x)), pretrained(x), atol=1e-5)
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Module()
        self._names: tuple[str, ...] = ()

    def attach(self, model: nn.Module) -> None:
        module = unwrap(model)
        if any(type(part).__name__.startswith("FSDP") for part in (model, module)):
            raise RuntimeError(
                f"InitialAdapterTeacher: {type(module).__name__} spreads the adapters over the ranks; take the copy before "
                "wrapping, or use FrozenCopyTeacher"
            )
        layers = acting_adapters(module, "InitialAdapterTeacher")
        refuse_dropped_weights(module, layers, "InitialAdapterTeacher")
        if others := other_trainable(module, layers):
            warnings.warn(
                f"InitialAdapterTeacher: {others[0]!r} trains beside the adapters, and the teacher keeps its present value; "
                "a new head must be fitted before, or the teacher predicts at random"
            )
        self.start = nn.Module()
        self._names = tuple(_kept_tensors(module))
        for name, tensor in _kept_tensors(module).items():
            self.start.register_buffer(_key(name), tensor.detach().clone())

    def logits(self, step: Step) -> Tensor:
        module = unwrap(step.model)
        acting_adapters(module, "InitialAdapterTeacher")
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and name not in self._names:
                raise ValueError(
                    f"InitialAdapterTeacher: {name!r} trains now, but was frozen when the teacher was made, so that its "
                    "first value is lost; unfreeze it before training begins"
                )
        kept = {name: self.start.get_buffer(_key(name)) for name in self._names}
        return self._read(step, step.forward(model=_Substituted(module, kept), grad=False, training=False))


class FrozenCopyTeacher(AdapterTeacher):
    """A second, frozen model: the paper's way, at the price of twice the weights.

    Args:
        model: the pretrained model. None copies the trained one when training begins, adapters and all.

    Example:
        >>> import torch
        >>> teacher = FrozenCopyTeacher(nn.Linear(2, 2))
        >>> teacher.logits(Step(nn.Identity(), inputs=torch.ones(1, 2))).requires_grad
        False
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = None if model is None else model.eval().requires_grad_(False)

    def attach(self, model: nn.Module) -> None:
        if self.model is None:
            self.model = copy.deepcopy(unwrap(model)).eval().requires_grad_(False)
        elif unwrap(model) is self.model:
            raise ValueError("FrozenCopyTeacher: model must be another object than the model that trains; pass a copy")

    def logits(self, step: Step) -> Tensor:
        if self.model is None:
            raise RuntimeError(
                "FrozenCopyTeacher: there is no model yet; call attach(model) before training, as fit does"
            )
        return self._read(step, step.forward(model=self.model, grad=False, training=False))


class DisabledAdapterTeacher(AdapterTeacher):
    """The base weights without adapters: exact for plain LoRA, and nothing to keep. Refused where the base was replaced.

    Args:
        base_is_pretrained: says that the base weights are the pretrained ones although the adapters are not zero, e.g.
            where training of a plain adapter continues.

    Raises:
        ValueError: at `attach`, without adapters, where they start from a part of the weights (PiSSA, OLoRA, CorDA,
            LoRA-GA), for variants such as DoRA, or if more than adapters trains.

    Example:
        >>> from wellposed.weights.low_rank import add_low_rank
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        >>> _ = add_low_rank(model, rank=1, init="pissa")
        >>> DisabledAdapterTeacher().attach(model)
        Traceback (most recent call last):
        ValueError: DisabledAdapterTeacher: ...
    """

    def __init__(self, base_is_pretrained: bool = False) -> None:
        super().__init__()
        self.base_is_pretrained = base_is_pretrained

    def attach(self, model: nn.Module) -> None:
        module = unwrap(model)
        layers = acting_adapters(module, "DisabledAdapterTeacher")
        replaced = replaced_base(module)
        carrying = next((layer.name for layer in layers if carries_weights(layer)), None)
        if replaced or (carrying is not None and not self.base_is_pretrained):
            found = f"init_lora_weights={replaced!r}" if replaced else f"the adapter of {carrying!r} is not zero"
            raise ValueError(
                f"DisabledAdapterTeacher: {found}, so the base weights were replaced, and without the adapter the model is "
                "not the pretrained one; use InitialAdapterTeacher() (if they were not replaced: base_is_pretrained=True)"
            )
        unusual = next((layer.name for layer in layers if not layer.is_plain), None)
        if unusual is not None:
            raise ValueError(
                f"DisabledAdapterTeacher: {unusual!r} has more than a product of two factors (DoRA or another variant), "
                "which a scaling of 0 does not switch off; use InitialAdapterTeacher()"
            )
        if others := other_trainable(module, layers):
            raise ValueError(
                f"DisabledAdapterTeacher: {others[0]!r} trains beside the adapters, and its present value would teach; use "
                "InitialAdapterTeacher()"
            )

    def logits(self, step: Step) -> Tensor:
        layers = acting_adapters(unwrap(step.model), "DisabledAdapterTeacher")
        with disabled(layers):
            return self._read(step, step.forward(model=unwrap(step.model), grad=False, training=False))


class StoredTeacher(AdapterTeacher):
    """Logits that were computed once for every training example: no pass at all, where inputs are not augmented.

    Args:
        logits: (examples, classes), in the order of the data set.

    Raises:
        ValueError: in use, if the loop tells no index, or one out of range.

    Example:
        >>> import torch
        >>> teacher = StoredTeacher(torch.eye(3))
        >>> teacher.logits(Step(nn.Identity(), index=torch.tensor([2])))
        tensor([[0., 0., 1.]])
    """

    requires = frozenset({"index"})
    table: Tensor

    def __init__(self, logits: Float[Tensor, "examples classes"]) -> None:
        super().__init__()
        self.register_buffer("table", logits.detach())

    def logits(self, step: Step) -> Tensor:
        if not isinstance(step.index, Tensor):
            raise ValueError("StoredTeacher: step.index is missing; wrap the data set in IndexedDataset")
        return self.table[step.index.to(self.table.device)]


def _kept_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What trains, and the buffers that training may change."""
    state = module.state_dict(keep_vars=True)
    trainable: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return trainable | {name: buffer for name, buffer in module.named_buffers() if name in state}


def _key(name: str) -> str:
    return name.replace(".", "/")  # a buffer's name may hold no dot


class _Substituted(nn.Module):
    """The live model's forward pass with other tensors."""

    def __init__(self, live: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.live, self.tensors = live, tensors

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return functional_call(self.live, cast(Any, self.tensors), arguments, keywords)

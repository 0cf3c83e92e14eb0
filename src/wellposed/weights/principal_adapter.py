"""A PiSSA adapter as a plain LoRA adapter on the original weights, and a scale between the pretrained model and the tuned.

PiSSA (arXiv 2404.02948) trains B A on what the principal directions leave of W. Afterwards
`W_residual + s B A = W + s [B, -B_0] [A; A_0]`: an adapter of twice the rank on the weights that everybody has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..batching import unwrap
from .low_rank import LowRankLinear


@dataclass(frozen=True)
class AdapterStart:
    """The factors of one adapter before training, and its scaling."""

    lora_A: Float[Tensor, "rank inputs"]
    lora_B: Float[Tensor, "outputs rank"]
    scaling: float


def adapter_start(model: nn.Module) -> dict[str, AdapterStart]:
    """Copies of the factors of every low-rank layer, by its name; take them before training.

    Raises:
        ValueError: if the model holds no `LowRankLinear`.

    Example:
        >>> from wellposed.weights.low_rank import add_low_rank
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        >>> _ = add_low_rank(model, rank=2, init="pissa")
        >>> list(adapter_start(model))
        ['0']
    """
    return {
        name: AdapterStart(layer.lora_A.detach().clone(), layer.lora_B.detach().clone(), layer.scaling)
        for name, layer in _layers(model, "adapter_start").items()
    }


def plain_factors(
    lora_A: Float[Tensor, "rank inputs"],
    lora_B: Float[Tensor, "outputs rank"],
    start_A: Float[Tensor, "start inputs"],
    start_B: Float[Tensor, "outputs start"],
) -> tuple[Float[Tensor, "both inputs"], Float[Tensor, "outputs both"]]:
    """`[A; A_0]` and `[B, -B_0]`: their product is `B A - B_0 A_0`, what training added to the original weight.

    Example:
        >>> a, b = plain_factors(torch.ones(1, 2), torch.ones(3, 1), torch.ones(1, 2), torch.ones(3, 1))
        >>> (b @ a).abs().max()
        tensor(0.)
    """
    return torch.cat([lora_A, start_A.to(lora_A)]), torch.cat([lora_B, -start_B.to(lora_B)], 1)


@torch.no_grad()
def to_plain_adapter(model: nn.Module, start: Mapping[str, AdapterStart]) -> nn.Module:
    """Give every low-rank layer its original weight back, and what training added as an adapter of twice the rank.

    The outputs stay what they are, up to rounding. In place, after training: an optimizer still holds the old factors.

    Args:
        model: with `LowRankLinear` layers.
        start: from `adapter_start`, taken before training.

    Returns:
        The model.

    Raises:
        ValueError: before anything is changed: if the layers are not those of `start`, or were converted before.

    Example:
        >>> from wellposed.weights.low_rank import add_low_rank
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        >>> weight = model[0].weight.detach().clone()
        >>> _ = add_low_rank(model, rank=2, init="pissa")
        >>> layer = to_plain_adapter(model, adapter_start(model))[0]
        >>> torch.allclose(layer.base.weight, weight, atol=1e-6), layer.rank
        (True, 4)
    """
    layers = _layers(model, "to_plain_adapter")
    if set(layers) != set(start):
        odd = sorted(set(layers) ^ set(start))[0]
        where = "the model has no such layer" if odd in start else "start does not know it"
        raise ValueError(f"to_plain_adapter: start must hold the layers of the model, but {odd!r}: {where}")
    for name, layer in layers.items():
        old = start[name]
        if layer.lora_A.shape != old.lora_A.shape or layer.lora_B.shape != old.lora_B.shape:
            raise ValueError(
                f"to_plain_adapter: the adapter of {name!r} has rank {len(layer.lora_A)}, at the start it had "
                f"{len(old.lora_A)}: it was converted before, and a second time would add its start twice"
            )
        if layer.scaling != old.scaling:
            raise ValueError(
                f"to_plain_adapter: the scaling of {name!r} must be what it was at the start, {old.scaling}, got "
                f"{layer.scaling}; scale after the conversion"
            )
    for name, layer in layers.items():
        old, weight = start[name], layer.base.weight
        wide = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
        restored = weight.to(wide) + old.scaling * (
            old.lora_B.to(weight.device, wide) @ old.lora_A.to(weight.device, wide)
        )
        weight.copy_(restored)
        a, b = plain_factors(layer.lora_A, layer.lora_B, old.lora_A, old.lora_B)
        layer.lora_A, layer.lora_B = nn.Parameter(a), nn.Parameter(b)
        layer.rank = len(a)
    return model


def scale_adapters(model: nn.Module, share: float) -> nn.Module:
    """Multiply the scaling of every low-rank layer: between its base weights (0) and the tuned ones (1), as WiSE-FT does.

    Of a PiSSA adapter, call `to_plain_adapter` before: its base weights are not the pretrained ones.

    Args:
        model: with `LowRankLinear` layers.
        share: >= 0; above 1 it extrapolates.

    Raises:
        ValueError: for a negative share, or a model without low-rank layers.

    Example:
        >>> from wellposed.weights.low_rank import add_low_rank
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        >>> _ = add_low_rank(model, rank=2)
        >>> scale_adapters(model, 0.5)[0].scaling
        0.5
    """
    if not share >= 0:
        raise ValueError(f"scale_adapters: share must be >= 0, got {share}")
    for layer in _layers(model, "scale_adapters").values():
        layer.scaling *= share
    return model


def _layers(model: nn.Module, owner: str) -> dict[str, LowRankLinear]:
    found = {name: part for name, part in unwrap(model).named_modules() if isinstance(part, LowRankLinear)}
    if not found:
        raise ValueError(f"{owner}: model holds no low-rank layer; it was merged before, or never adapted")
    return found

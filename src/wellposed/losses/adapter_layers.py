"""Finding low-rank adapters in a model: this library's layers and PEFT's, by what they hold and not by their class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

_REPLACING = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterLayer:
    """One layer with low-rank updates.

    Attributes:
        name: of the layer in its model.
        module: holds `lora_A`, `lora_B` and `scaling`: tensors and a number (`wellposed.weights.LowRankLinear`), or
            mappings by adapter (PEFT).
    """

    name: str
    module: Any

    @property
    def is_mapping(self) -> bool:
        """Whether the layer holds several adapters by name, as PEFT's do."""
        return isinstance(self.module.lora_A, nn.ModuleDict)

    @property
    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """A and B of all its adapters."""
        module = self.module
        if not self.is_mapping:
            return [(module.lora_A, module.lora_B)]
        linear = [(part.weight, module.lora_B[name].weight) for name, part in module.lora_A.items()]
        embedding = getattr(module, "lora_embedding_A", {})
        return linear + [(a, module.lora_embedding_B[name]) for name, a in embedding.items()]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What belongs to the adapters, and not to the base."""
        return [p for name, p in self.module.named_parameters() if name.startswith("lora_")]

    @property
    def dropout(self) -> float:
        """The largest rate at which inputs of the update are dropped."""
        if not self.is_mapping:
            return float(getattr(self.module, "dropout", 0.0))
        return max((float(getattr(part, "p", 0.0)) for part in self.module.lora_dropout.values()), default=0.0)

    @property
    def is_merged(self) -> bool:
        """Whether PEFT folded an adapter into the base weight, so that the factors act no more."""
        return self.is_mapping and bool(getattr(self.module, "merged_adapters", ()))

    @property
    def is_plain(self) -> bool:
        """Whether the update is `scaling * B A` alone (no DoRA or other variant)."""
        return not (getattr(self.module, "lora_magnitude_vector", None) or getattr(self.module, "lora_variant", None))


def adapter_layers(model: nn.Module) -> list[AdapterLayer]:
    """All layers of a model with low-rank adapters, in order.

    Example:
        >>> from wellposed.weights.low_rank import add_low_rank
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        >>> _ = add_low_rank(model, rank=2)
        >>> [layer.name for layer in adapter_layers(model)]
        ['0']
    """
    return [
        AdapterLayer(name, module)
        for name, module in model.named_modules()
        if all(hasattr(module, attribute) for attribute in ("lora_A", "lora_B", "scaling"))
    ]


def acting_adapters(model: nn.Module, owner: str) -> list[AdapterLayer]:
    """The adapter layers of a model, in a state in which their factors act.

    Raises:
        ValueError: naming `owner`, if there are none, or if one is merged.
    """
    layers = adapter_layers(model)
    if not layers:
        raise ValueError(
            f"{owner}: model holds no low-rank adapter; attach it first, e.g. "
            "Compose(LowRankAdaptation(rank=8, init='pissa'), BiasAlleviatingLoRA(...)), or use PEFT's get_peft_model"
        )
    for layer in layers:
        if layer.is_merged:
            raise ValueError(f"{owner}: the adapter of {layer.name!r} is merged into its base weight; unmerge it first")
    return layers


def replaced_base(model: nn.Module) -> str | None:
    """How PEFT initialised an adapter that took a part of the base weights over ("pissa", ...), or None."""
    for configuration in (getattr(model, "peft_config", None) or {}).values():
        method = str(getattr(configuration, "init_lora_weights", "")).lower()
        if method.startswith(_REPLACING):
            return method
    return None


def refuse_dropped_weights(model: nn.Module, layers: list[AdapterLayer], owner: str) -> None:
    """Raise if dropout acts on adapters that carry a part of the pretrained weights: dropping it gives another model.

    Raises:
        ValueError: naming `owner` and the layer.
    """
    known = getattr(model, "peft_config", None) is not None
    for layer in layers:
        if layer.dropout > 0 and (replaced_base(model) if known else carries_weights(layer)):
            raise ValueError(
                f"{owner}: dropout of the adapter of {layer.name!r} must be 0, got {layer.dropout}: it starts from a part "
                "of the weights (PiSSA), and a dropped part is no pretrained model"
            )


def carries_weights(layer: AdapterLayer) -> bool:
    """Whether an adapter that has not been trained yet differs from zero: its base weight is not the pretrained one."""
    return any(bool(a.detach().any()) and bool(b.detach().any()) for a, b in layer.factors)


def other_trainable(model: nn.Module, layers: list[AdapterLayer]) -> list[str]:
    """Names of the parameters that train beside the adapters."""
    own = {id(p) for layer in layers for p in layer.parameters}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]


@contextmanager
def disabled(layers: list[AdapterLayer]) -> Iterator[None]:
    """Let the layers act as their base alone inside the block: every scaling is 0."""
    before = [dict(layer.module.scaling) if layer.is_mapping else layer.module.scaling for layer in layers]
    try:
        for layer in layers:
            if layer.is_mapping:
                cast(dict[str, float], layer.module.scaling).update(dict.fromkeys(layer.module.scaling, 0.0))
            else:
                layer.module.scaling = 0.0
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            if layer.is_mapping:
                layer.module.scaling.update(old)
            else:
                layer.module.scaling = old

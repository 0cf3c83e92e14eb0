"""What a method finds when it is given a model wrapped by PEFT: adapters that train, and a base that is frozen."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ..batching import unwrap
from ..parameters import trainable_names
from ..regularizer import Regularizer, leaves


def is_peft(model: nn.Module) -> bool:
    """Whether `model` is wrapped by PEFT; PEFT need not be installed."""
    return callable(getattr(unwrap(model), "get_base_model", None)) and hasattr(unwrap(model), "peft_config")


def base_model_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper (with the adapter layers in place), or the model itself.

    Example:
        >>> base_model_of(layer := nn.Linear(2, 2)) is layer
        True
    """
    model = unwrap(model)
    if not is_peft(model):
        return model
    base: nn.Module = model.get_base_model()  # type: ignore[operator]
    return base


def is_prompt_learning(model: nn.Module) -> bool:
    """Whether PEFT puts virtual tokens before the inputs (prompt and prefix tuning)."""
    model = unwrap(model)
    return is_peft(model) and any(c.is_prompt_learning for c in model.peft_config.values())  # type: ignore[union-attr, operator]


def check_base_weights(regularizer: Regularizer, model: nn.Module) -> None:
    """Refuse a method that needs the base weights on a model whose adapters alone train.

    A method says so by a class attribute `needs_base_weights = True`.

    Raises:
        ValueError: naming the method.
    """
    if not is_peft(model):
        return
    for part in leaves([regularizer]):
        if getattr(part, "needs_base_weights", False):
            raise ValueError(
                f"{type(part).__name__} needs the base weights, but the model is wrapped by PEFT, which freezes them and "
                "saves the adapters alone; pass the plain model, or merge the adapters first "
                "(model.merge_and_unload())"
            )


def check_saved_by_peft(regularizer: Regularizer, model: nn.Module, before: Collection[str]) -> None:
    """Refuse a method whose `attach` made weights trainable that PEFT would not save: they would be lost.

    Args:
        regularizer: has been attached.
        model: as `attach` returned it.
        before: names of the parameters that trained before.

    Raises:
        ValueError: naming the method and a parameter.
    """
    if not is_peft(model):
        return
    new = [name for name in trainable_names(model) if name not in before and not _belongs_to_adapter(name, model)]
    if new:
        names = [type(part).__name__ for part in leaves([regularizer]) if "attach" in part.acts_in]
        raise ValueError(
            f"{' and '.join(names)} made {new[0]!r} trainable, a weight of the base, but the model is wrapped by PEFT, "
            "which saves the adapters alone; attach to the plain model instead"
        )


def _belongs_to_adapter(name: str, model: nn.Module) -> bool:
    adapters = set(unwrap(model).peft_config)  # type: ignore[arg-type]
    parts = name.split(".")
    return "modules_to_save" in parts or any(adapter in parts for adapter in adapters)

"""What `RegularizerCallback` refuses before anything trains, each with the remedy."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from .lightning_groups import WishedGroups

OWNER = "RegularizerCallback"
_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
_OVERRIDES = {
    "configure_gradient_clipping": f"pass {OWNER}(clip_norm=...)",
    "optimizer_step": "schedule the learning rate by a scheduler in configure_optimizers",
}


def check_trainer(trainer: Any, module: Any) -> None:
    """Refuse settings of a Trainer, or of a module, that the callback could not carry out.

    Raises:
        ValueError: naming the setting and what to use in its place.
    """
    if trainer.accumulate_grad_batches > 1:
        parts = trainer.accumulate_grad_batches
        raise ValueError(
            f"{OWNER}: Trainer(accumulate_grad_batches={parts}) has no effect on a step that the callback drives; let the "
            f"loader yield batches {parts} times as large, and pass {OWNER}(accumulation={parts})"
        )
    if trainer.gradient_clip_val:
        raise ValueError(
            f"{OWNER}: Trainer(gradient_clip_val={trainer.gradient_clip_val}) would not clip what the callback drives; "
            f"pass {OWNER}(clip_norm={trainer.gradient_clip_val}), which clips the global norm"
        )
    if not module.automatic_optimization:
        raise ValueError(
            f"{OWNER}: {type(module).__name__} uses manual optimization, and the callback drives the step itself; remove "
            "automatic_optimization = False, or call wellposed.Accumulation in your own training_step"
        )
    for hook, remedy in _OVERRIDES.items():
        if _overrides(module, hook):
            raise ValueError(f"{OWNER}: {type(module).__name__}.{hook} would not be called; {remedy}")
    kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    if "DeepSpeedStrategy" in kinds or not any(kind in kinds for kind in _STRATEGIES):
        raise ValueError(
            f"{OWNER}: strategy must be 'auto' on one device, or 'ddp', got {kinds[0]}: it shards or replaces the "
            "parameters and gradients that methods read"
        )
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise ValueError(f"{OWNER}: schedules need a planned length; set Trainer(max_epochs=...) or max_steps")


def check_optimizer(
    found: Any, groups: WishedGroups, built: list[Optimizer], earlier: set[int], module: Any
) -> Optimizer:
    """The one optimizer of a module, checked against the network that it is to train.

    Args:
        found: what `configure_optimizers` returned.
        groups: of the network.
        built: the optimizers that were built inside `configure_optimizers`.
        earlier: ids of the module's parameters before `attach`.
        module: the LightningModule.

    Raises:
        ValueError: for none or several optimizers; for one that was built before `attach` changed what trains; for one
            that holds parameters outside of the network.
    """
    optimizers = _optimizers_in(found)
    if len(optimizers) != 1:
        count = "no optimizer" if not optimizers else f"{len(optimizers)} optimizers"
        raise ValueError(
            f"{OWNER}: {type(module).__name__}.configure_optimizers returned {count}; the callback drives exactly one"
        )
    optimizer = optimizers[0]
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) in held and groups.name_of(parameter) is None:
            raise ValueError(
                f"{OWNER}: the optimizer holds {name!r}, which is no part of the network that the callback trains; name "
                "the attribute that holds all of it by model=, or pass model=None: the module itself is then called"
            )
    new = [
        name
        for name, p in groups.named.items()
        if p.requires_grad and name not in groups.owned and id(p) not in held and id(p) not in earlier
    ]
    early = bool(groups.wishes) and not any(optimizer is one for one in built)
    if new or early:
        reason = f"added the parameter {new[0]!r}" if new else "asks for its own parameter groups"
        raise ValueError(
            f"{OWNER}: the optimizer was configured before attach, but the regularizer {reason}; build the optimizer "
            "inside configure_optimizers from self.parameters()"
        )
    return optimizer


def check_network(found: Any, path: str | None, module: Any) -> nn.Module:
    """The network at an attribute of a module.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"{OWNER}: model={path!r} must name an attribute of {type(module).__name__} that holds the network, found "
            f"{type(found).__name__}; pass its name, or model=None: the module itself is then called"
        )
    return found


def _overrides(module: Any, hook: str) -> bool:
    base = next(kind for kind in type(module).__mro__ if kind.__name__ == "LightningModule")
    return getattr(type(module), hook) is not getattr(base, hook)


def _optimizers_in(found: Any) -> list[Optimizer]:
    """The optimizers in what `configure_optimizers` may return: one, a dict, or sequences of either."""
    if isinstance(found, Optimizer):
        return [found]
    if isinstance(found, dict):
        return _optimizers_in(found.get("optimizer"))
    if isinstance(found, (list, tuple)):
        return [optimizer for part in found for optimizer in _optimizers_in(part)]
    return []

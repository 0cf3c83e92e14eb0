"""What a run changes in a LightningModule and in the Trainer's loops, and puts back at its end."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import nn

_MISSING = object()


class Overrides:
    """Methods of one object that are others for the length of a run.

    Example:
        >>> class Greeter:
        ...     def greet(self):
        ...         return "hello"
        >>> greeter = Greeter()
        >>> overrides = Overrides(greeter)
        >>> overrides.set("greet", lambda: "good day")
        >>> greeter.greet()
        'good day'
        >>> overrides.restore()
        >>> greeter.greet()
        'hello'
    """

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self._before: dict[str, Any] = {}

    def set(self, name: str, value: Any) -> None:
        """Put `value` in the place of a method."""
        self._before.setdefault(name, vars(self.owner).get(name, _MISSING))
        vars(self.owner)[name] = value

    def restore(self) -> None:
        """Put back what was there."""
        for name, value in self._before.items():
            if value is _MISSING:
                vars(self.owner).pop(name, None)
            else:
                vars(self.owner)[name] = value
        self._before = {}


def network_at(module: nn.Module, path: str | None) -> Any:
    """What a module holds at a dotted path; the module itself for None, and None where nothing is."""
    try:
        return module if path is None else attrgetter(path)(module)
    except AttributeError:
        return None


def put_network(module: nn.Module, path: str, network: nn.Module) -> None:
    """Make `network` what a module holds at a dotted path."""
    owner, _, name = path.rpartition(".")
    setattr(attrgetter(owner)(module) if owner else module, name, network)


def switch_optimization(trainer: Any, module: Any, *, automatic: bool) -> None:
    """Switch between automatic and manual optimization, and take the count of steps along.

    Lightning counts the steps of the two ways separately; `trainer.global_step` would start at 0 after a switch.
    """
    steps = trainer.global_step
    module.automatic_optimization = automatic
    loop = trainer.fit_loop.epoch_loop
    progress = (
        loop.automatic_optimization.optim_progress.optimizer.step
        if automatic
        else loop.manual_optimization.optim_step_progress
    )
    progress.total.ready = progress.total.completed = steps

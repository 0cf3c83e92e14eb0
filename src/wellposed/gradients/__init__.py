"""Methods that act on batches and gradients."""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .sharpness_aware import SharpnessAwareMinimization as SharpnessAwareMinimization
    from .sharpness_aware import perturbed as perturbed

__getattr__, __dir__, __all__ = lazy.attach(
    __name__, submod_attrs={"sharpness_aware": ["SharpnessAwareMinimization", "perturbed"]}
)

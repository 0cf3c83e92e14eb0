"""Methods that act on parameters: decay, averaging, selection along the training path."""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .early_stopping import EarlyStopping as EarlyStopping
    from .weight_averaging import WeightAveraging as WeightAveraging
    from .weight_decay import WeightDecay as WeightDecay

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "early_stopping": ["EarlyStopping"],
        "weight_averaging": ["WeightAveraging"],
        "weight_decay": ["WeightDecay"],
    },
)

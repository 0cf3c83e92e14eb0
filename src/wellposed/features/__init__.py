"""Methods that act on hidden representations."""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .dropout import Dropout as Dropout

__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={"dropout": ["Dropout"]})

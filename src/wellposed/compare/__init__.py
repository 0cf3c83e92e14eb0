"""`wellposed compare`: which regularizer helps on your data, and by how much."""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .comparison import Options as Options
    from .comparison import compare as compare
    from .errors import UserError as UserError
    from .task import Task as Task
    from .training import recipe as recipe

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "comparison": ["Options", "compare"],
        "errors": ["UserError"],
        "task": ["Task"],
        "training": ["recipe"],
    },
)

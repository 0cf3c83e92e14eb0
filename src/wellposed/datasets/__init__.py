"""Data sets that ship inside packages: nothing is downloaded unless `wellposed data get` is asked to."""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .arrays import Arrays as Arrays
    from .arrays import DatasetError as DatasetError
    from .fetching import get_dataset as get_dataset
    from .registry import DatasetNotInstalled as DatasetNotInstalled
    from .registry import find_dataset as find_dataset
    from .registry import list_datasets as list_datasets
    from .registry import load_dataset as load_dataset

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "arrays": ["Arrays", "DatasetError"],
        "fetching": ["get_dataset"],
        "registry": ["DatasetNotInstalled", "find_dataset", "list_datasets", "load_dataset"],
    },
)

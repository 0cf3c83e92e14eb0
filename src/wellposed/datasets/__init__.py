"""Data sets that ship inside packages: nothing is downloaded unless `wellposed data get` is asked to."""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .fetching import get_dataset as get_dataset
    from .registry import Arrays as Arrays
    from .registry import DatasetError as DatasetError
    from .registry import DatasetNotInstalled as DatasetNotInstalled
    from .registry import find_dataset as find_dataset
    from .registry import list_datasets as list_datasets
    from .registry import load_dataset as load_dataset

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "fetching": ["get_dataset"],
        "registry": ["Arrays", "DatasetError", "DatasetNotInstalled", "find_dataset", "list_datasets", "load_dataset"],
    },
)

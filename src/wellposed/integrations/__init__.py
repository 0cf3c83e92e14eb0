"""Bridges to other libraries: each module needs the library whose name it bears, and nothing else does."""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .optuna_search import OptunaSearch as OptunaSearch
    from .scikit_learn import BilevelLogisticRegression as BilevelLogisticRegression
    from .scikit_learn import BilevelRidge as BilevelRidge

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "optuna_search": ["OptunaSearch"],
        "scikit_learn": ["BilevelLogisticRegression", "BilevelRidge"],
    },
)

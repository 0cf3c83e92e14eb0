"""wellposed: published regularization methods behind one small contract, and a laboratory that tests them.

Names are loaded when first used, so that `import wellposed` does not import torch.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .accumulation import Accumulation as Accumulation
    from .averaging import WeightAverage as WeightAverage
    from .bilevel import BilevelProblem as BilevelProblem
    from .compose import Compose as Compose
    from .fit import FitResult as FitResult
    from .fit import fit as fit
    from .hyperparameter import Hyperparameter as Hyperparameter
    from .indexed_dataset import IndexedDataset as IndexedDataset
    from .indexed_dataset import TensorLoader as TensorLoader
    from .objective import cross_entropy as cross_entropy
    from .objective import squared_error as squared_error
    from .pair import Pair as Pair
    from .regularizer import Regularizer as Regularizer
    from .regularizer import RequirementError as RequirementError
    from .sample_table import SampleTable as SampleTable
    from .step import DivergenceError as DivergenceError
    from .step import Step as Step
    from .step import record as record
    from .tuner import Tuner as Tuner

try:
    __version__ = version("wellposed")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=[
        "compare",
        "continual_metrics",
        "datasets",
        "features",
        "gradients",
        "integrations",
        "inverse",
        "lab",
        "losses",
        "metrics",
        "numerics",
        "papers",
        "tuning",
        "weights",
    ],
    submod_attrs={
        "accumulation": ["Accumulation"],
        "averaging": ["WeightAverage"],
        "bilevel": ["BilevelProblem"],
        "compose": ["Compose"],
        "fit": ["FitResult", "fit"],
        "hyperparameter": ["Hyperparameter"],
        "indexed_dataset": ["IndexedDataset", "TensorLoader"],
        "objective": ["cross_entropy", "squared_error"],
        "pair": ["Pair"],
        "regularizer": ["Regularizer", "RequirementError"],
        "sample_table": ["SampleTable"],
        "step": ["DivergenceError", "Step", "record"],
        "tuner": ["Tuner"],
    },
)

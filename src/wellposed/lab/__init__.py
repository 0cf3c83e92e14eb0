"""The laboratory: trials, a runner that loses nothing, a store, statistics and reports. It knows no method."""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .runner import run_trials as run_trials
    from .space import parse_space as parse_space
    from .statistics import Interval as Interval
    from .statistics import mean_interval as mean_interval
    from .statistics import paired_interval as paired_interval
    from .statistics import sign_flip_p as sign_flip_p
    from .store import Store as Store
    from .store import StoreError as StoreError
    from .trial import Outcome as Outcome
    from .trial import Trial as Trial
    from .trial import TrialResult as TrialResult
    from .tuning import Tuned as Tuned
    from .tuning import tune_arms as tune_arms

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "runner": ["run_trials"],
        "space": ["parse_space"],
        "statistics": ["Interval", "mean_interval", "paired_interval", "sign_flip_p"],
        "store": ["Store", "StoreError"],
        "trial": ["Outcome", "Trial", "TrialResult"],
        "tuning": ["Tuned", "tune_arms"],
    },
)

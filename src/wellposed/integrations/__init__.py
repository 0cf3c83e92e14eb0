"""Bridges to other libraries: each module needs the library whose name it bears, and nothing else does."""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .botorch_surrogate import BotorchSurrogate as BotorchSurrogate
    from .half_fine_tuning_callback import HalfFineTuningCallback as HalfFineTuningCallback
    from .lightning_callback import RegularizerCallback as RegularizerCallback
    from .optuna_search import OptunaSearch as OptunaSearch
    from .peft_models import base_model_of as base_model_of
    from .scikit_learn import BilevelLogisticRegression as BilevelLogisticRegression
    from .scikit_learn import BilevelRidge as BilevelRidge
    from .transformers_trainer import RegularizedTrainer as RegularizedTrainer
    from .transformers_trainer import RegularizerMixin as RegularizerMixin
    from .trl_trainers import RegularizedDPOTrainer as RegularizedDPOTrainer
    from .trl_trainers import RegularizedSFTTrainer as RegularizedSFTTrainer

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "botorch_surrogate": ["BotorchSurrogate"],
        "half_fine_tuning_callback": ["HalfFineTuningCallback"],
        "lightning_callback": ["RegularizerCallback"],
        "optuna_search": ["OptunaSearch"],
        "peft_models": ["base_model_of"],
        "scikit_learn": ["BilevelLogisticRegression", "BilevelRidge"],
        "transformers_trainer": ["RegularizedTrainer", "RegularizerMixin"],
        "trl_trainers": ["RegularizedDPOTrainer", "RegularizedSFTTrainer"],
    },
)

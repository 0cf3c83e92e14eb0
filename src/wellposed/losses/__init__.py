"""Methods that act on targets and the loss."""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .early_learning import EarlyLearning as EarlyLearning
    from .early_learning import early_learning_penalty as early_learning_penalty
    from .early_learning_plus import EarlyLearningPlus as EarlyLearningPlus
    from .label_smoothing import LabelSmoothing as LabelSmoothing
    from .label_smoothing import smoothed_cross_entropy as smoothed_cross_entropy
    from .mixup import Mixup as Mixup
    from .robust import GeneralizedCrossEntropy as GeneralizedCrossEntropy
    from .robust import SymmetricCrossEntropy as SymmetricCrossEntropy
    from .robust import generalized_cross_entropy as generalized_cross_entropy
    from .robust import symmetric_cross_entropy as symmetric_cross_entropy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "early_learning": ["EarlyLearning", "early_learning_penalty"],
        "early_learning_plus": ["EarlyLearningPlus"],
        "label_smoothing": ["LabelSmoothing", "smoothed_cross_entropy"],
        "mixup": ["Mixup"],
        "robust": [
            "GeneralizedCrossEntropy",
            "SymmetricCrossEntropy",
            "generalized_cross_entropy",
            "symmetric_cross_entropy",
        ],
    },
)

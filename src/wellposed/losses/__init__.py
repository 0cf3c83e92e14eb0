"""Methods that act on targets and the loss."""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .co_teaching import CoTeaching as CoTeaching
    from .co_teaching import CoTeachingOutput as CoTeachingOutput
    from .co_teaching import co_teaching_step as co_teaching_step
    from .early_learning import EarlyLearning as EarlyLearning
    from .early_learning import early_learning_penalty as early_learning_penalty
    from .early_learning_plus import EarlyLearningPlus as EarlyLearningPlus
    from .frozen_batch_norm import FrozenBatchNorm as FrozenBatchNorm
    from .hard_examples import doubt as doubt
    from .hard_examples import gradient_rescaling as gradient_rescaling
    from .hard_examples import hard_example_shift as hard_example_shift
    from .label_smoothing import LabelSmoothing as LabelSmoothing
    from .label_smoothing import smoothed_cross_entropy as smoothed_cross_entropy
    from .mixup import Mixup as Mixup
    from .past_model import PastModelTeacher as PastModelTeacher
    from .prediction_memory import PredictionMemory as PredictionMemory
    from .robust import GeneralizedCrossEntropy as GeneralizedCrossEntropy
    from .robust import SymmetricCrossEntropy as SymmetricCrossEntropy
    from .robust import generalized_cross_entropy as generalized_cross_entropy
    from .robust import symmetric_cross_entropy as symmetric_cross_entropy
    from .sample_selection import forget_rate_at as forget_rate_at
    from .sample_selection import num_kept as num_kept
    from .sample_selection import small_loss as small_loss
    from .self_distillation import ProgressiveSelfDistillation as ProgressiveSelfDistillation
    from .soft_targets import progressive_targets as progressive_targets

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "co_teaching": ["CoTeaching", "CoTeachingOutput", "co_teaching_step"],
        "frozen_batch_norm": ["FrozenBatchNorm"],
        "sample_selection": ["forget_rate_at", "num_kept", "small_loss"],
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
        "hard_examples": ["doubt", "gradient_rescaling", "hard_example_shift"],
        "past_model": ["PastModelTeacher"],
        "prediction_memory": ["PredictionMemory"],
        "soft_targets": ["progressive_targets"],
        "self_distillation": ["ProgressiveSelfDistillation"],
    },
)

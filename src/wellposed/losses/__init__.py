"""Methods that act on targets and the loss."""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .adapter_teacher import AdapterTeacher as AdapterTeacher
    from .adapter_teacher import DisabledAdapterTeacher as DisabledAdapterTeacher
    from .adapter_teacher import FrozenCopyTeacher as FrozenCopyTeacher
    from .adapter_teacher import InitialAdapterTeacher as InitialAdapterTeacher
    from .adapter_teacher import StoredTeacher as StoredTeacher
    from .bias_alleviating import BiasAlleviatingLoRA as BiasAlleviatingLoRA
    from .bias_alleviating import BiasAlleviatingTerms as BiasAlleviatingTerms
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
    from .logit_consistency import kl_consistency as kl_consistency
    from .logit_consistency import normalized_mse_consistency as normalized_mse_consistency
    from .logit_consistency import teacher_confidence as teacher_confidence
    from .logit_diversity import logit_covariance as logit_covariance
    from .logit_diversity import topk_entropy as topk_entropy
    from .logit_spectrum import head_factor as head_factor
    from .logit_spectrum import logits_in_head_basis as logits_in_head_basis
    from .logit_spectrum import randomized_singular_values as randomized_singular_values
    from .logit_spectrum import spectral_concentration as spectral_concentration
    from .logit_terms import LogitConsistency as LogitConsistency
    from .logit_terms import LogitDiversity as LogitDiversity
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
    from .spectral_term import SpectralConcentration as SpectralConcentration

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "co_teaching": ["CoTeaching", "CoTeachingOutput", "co_teaching_step"],
        "frozen_batch_norm": ["FrozenBatchNorm"],
        "sample_selection": ["forget_rate_at", "num_kept", "small_loss"],
        "early_learning": ["EarlyLearning", "early_learning_penalty"],
        "early_learning_plus": ["EarlyLearningPlus"],
        "label_smoothing": ["LabelSmoothing", "smoothed_cross_entropy"],
        "adapter_teacher": [
            "AdapterTeacher",
            "DisabledAdapterTeacher",
            "FrozenCopyTeacher",
            "InitialAdapterTeacher",
            "StoredTeacher",
        ],
        "bias_alleviating": ["BiasAlleviatingLoRA", "BiasAlleviatingTerms"],
        "logit_consistency": ["kl_consistency", "normalized_mse_consistency", "teacher_confidence"],
        "logit_diversity": ["logit_covariance", "topk_entropy"],
        "logit_terms": ["LogitConsistency", "LogitDiversity"],
        "logit_spectrum": [
            "head_factor",
            "logits_in_head_basis",
            "randomized_singular_values",
            "spectral_concentration",
        ],
        "spectral_term": ["SpectralConcentration"],
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

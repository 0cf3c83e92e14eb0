"""Methods that act on hidden representations."""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .bias_variance import FeatureDecomposition as FeatureDecomposition
    from .bias_variance import feature_decomposition as feature_decomposition
    from .cutout import Cutout as Cutout
    from .cutout import cut_holes as cut_holes
    from .dropout import Dropout as Dropout
    from .feature_compression import FeatureCompression as FeatureCompression
    from .input_noise import InputNoise as InputNoise
    from .nested_dropout import NestedDropout as NestedDropout
    from .prefix_evaluation import expected_prefix_loss as expected_prefix_loss
    from .prefix_evaluation import prefix_accuracy as prefix_accuracy
    from .prefix_evaluation import prefix_logits as prefix_logits
    from .prefix_evaluation import select_prefix as select_prefix
    from .prefix_lengths import keep_probabilities as keep_probabilities
    from .prefix_lengths import prefix_distribution as prefix_distribution

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "bias_variance": ["FeatureDecomposition", "feature_decomposition"],
        "cutout": ["Cutout", "cut_holes"],
        "dropout": ["Dropout"],
        "feature_compression": ["FeatureCompression"],
        "input_noise": ["InputNoise"],
        "nested_dropout": ["NestedDropout"],
        "prefix_lengths": ["keep_probabilities", "prefix_distribution"],
        "prefix_evaluation": ["expected_prefix_loss", "prefix_accuracy", "prefix_logits", "select_prefix"],
    },
)

"""Methods that act on parameters: decay, averaging, selection along the training path."""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .attention_projections import SplitAttention as SplitAttention
    from .attention_projections import join_attention as join_attention
    from .attention_projections import split_attention as split_attention
    from .compander import WeightCompander as WeightCompander
    from .compander_attach import apply_compander as apply_compander
    from .compander_decay import compander_parameter_groups as compander_parameter_groups
    from .compander_decay import compander_penalty as compander_penalty
    from .compander_folding import fold_compander as fold_compander
    from .compander_folding import load_plain_state_dict as load_plain_state_dict
    from .compander_folding import plain_state_dict as plain_state_dict
    from .compander_functions import compand as compand
    from .compander_functions import compander_bound as compander_bound
    from .compander_functions import compander_slope as compander_slope
    from .compander_functions import uncompand as uncompand
    from .compander_module import Compander as Compander
    from .compander_module import companded as companded
    from .compander_step import CompanderStep as CompanderStep
    from .democracy import effective_number_of_weights as effective_number_of_weights
    from .democracy import pruned_accuracy as pruned_accuracy
    from .democracy import randomly_pruned as randomly_pruned
    from .democracy import weight_statistics as weight_statistics
    from .democracy import weight_tensors as weight_tensors
    from .early_stopping import EarlyStopping as EarlyStopping
    from .half_fine_tuning import HalfFineTuning as HalfFineTuning
    from .half_report import MaskReport as MaskReport
    from .interpolation import WeightInterpolation as WeightInterpolation
    from .interpolation import half_reset as half_reset
    from .interpolation import interpolate_weights as interpolate_weights
    from .l2_sp import L2StartingPoint as L2StartingPoint
    from .low_rank import LowRankAdaptation as LowRankAdaptation
    from .low_rank import LowRankLinear as LowRankLinear
    from .low_rank import add_low_rank as add_low_rank
    from .low_rank import merge_low_rank as merge_low_rank
    from .low_rank import principal_factors as principal_factors
    from .principal_adapter import AdapterStart as AdapterStart
    from .principal_adapter import adapter_start as adapter_start
    from .principal_adapter import plain_factors as plain_factors
    from .principal_adapter import scale_adapters as scale_adapters
    from .principal_adapter import to_plain_adapter as to_plain_adapter
    from .weight_averaging import WeightAveraging as WeightAveraging
    from .weight_decay import WeightDecay as WeightDecay

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "attention_projections": ["SplitAttention", "join_attention", "split_attention"],
        "compander": ["WeightCompander"],
        "compander_attach": ["apply_compander"],
        "compander_functions": ["compand", "compander_bound", "compander_slope", "uncompand"],
        "compander_decay": ["compander_parameter_groups", "compander_penalty"],
        "compander_folding": ["fold_compander", "load_plain_state_dict", "plain_state_dict"],
        "compander_module": ["Compander", "companded"],
        "compander_step": ["CompanderStep"],
        "democracy": [
            "effective_number_of_weights",
            "pruned_accuracy",
            "randomly_pruned",
            "weight_statistics",
            "weight_tensors",
        ],
        "early_stopping": ["EarlyStopping"],
        "half_fine_tuning": ["HalfFineTuning"],
        "half_report": ["MaskReport"],
        "interpolation": ["WeightInterpolation", "half_reset", "interpolate_weights"],
        "l2_sp": ["L2StartingPoint"],
        "low_rank": ["LowRankAdaptation", "LowRankLinear", "add_low_rank", "merge_low_rank", "principal_factors"],
        "principal_adapter": ["AdapterStart", "adapter_start", "plain_factors", "scale_adapters", "to_plain_adapter"],
        "weight_averaging": ["WeightAveraging"],
        "weight_decay": ["WeightDecay"],
    },
)

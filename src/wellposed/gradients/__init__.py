"""Methods that act on batches and gradients."""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .conservative_objective import ConservativeObjective as ConservativeObjective
    from .coreset_loader import CoresetBatchSampler as CoresetBatchSampler
    from .coreset_loader import CoresetDataLoader as CoresetDataLoader
    from .gradient_rules import regularized_gradient as regularized_gradient
    from .greedy_medoids import facility_location as facility_location
    from .greedy_medoids import pairwise_similarity as pairwise_similarity
    from .last_layer_gradient import last_layer_gradients as last_layer_gradients
    from .mini_batch_coreset import MiniBatchCoreset as MiniBatchCoreset
    from .multiplier import dual_ascent as dual_ascent
    from .offline_search import best_designs as best_designs
    from .offline_search import evolution_search as evolution_search
    from .offline_search import input_gradient as input_gradient
    from .offline_search import offline_optimize as offline_optimize
    from .offline_search import percentile_report as percentile_report
    from .output_gradient import MeanPrediction as MeanPrediction
    from .output_gradient import mean_output as mean_output
    from .sharpness_aware import SharpnessAwareMinimization as SharpnessAwareMinimization
    from .sharpness_aware import perturbed as perturbed
    from .sharpness_constraint import SurrogateSharpness as SurrogateSharpness
    from .sharpness_measure import surrogate_sharpness as surrogate_sharpness
    from .sharpness_steering import RegularizedGradient as RegularizedGradient
    from .source_discovery import SourceDiscovery as SourceDiscovery
    from .source_shares import small_sources as small_sources
    from .source_shares import source_budgets as source_budgets
    from .steered_sam import SteeredSAM as SteeredSAM
    from .surrogate_ensemble import SurrogateEnsemble as SurrogateEnsemble
    from .surrogate_ensemble import ensemble_squared_error as ensemble_squared_error

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "conservative_objective": ["ConservativeObjective"],
        "coreset_loader": ["CoresetBatchSampler", "CoresetDataLoader"],
        "greedy_medoids": ["facility_location", "pairwise_similarity"],
        "last_layer_gradient": ["last_layer_gradients"],
        "gradient_rules": ["regularized_gradient"],
        "mini_batch_coreset": ["MiniBatchCoreset"],
        "sharpness_steering": ["RegularizedGradient"],
        "steered_sam": ["SteeredSAM"],
        "source_shares": ["small_sources", "source_budgets"],
        "source_discovery": ["SourceDiscovery"],
        "multiplier": ["dual_ascent"],
        "offline_search": [
            "best_designs",
            "evolution_search",
            "input_gradient",
            "offline_optimize",
            "percentile_report",
        ],
        "output_gradient": ["MeanPrediction", "mean_output"],
        "sharpness_aware": ["SharpnessAwareMinimization", "perturbed"],
        "sharpness_measure": ["surrogate_sharpness"],
        "surrogate_ensemble": ["SurrogateEnsemble", "ensemble_squared_error"],
        "sharpness_constraint": ["SurrogateSharpness"],
    },
)

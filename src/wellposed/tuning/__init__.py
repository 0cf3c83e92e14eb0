"""Methods that learn hyperparameters: tuners of bilevel problems, and what they are made of."""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .bo_rep import BOREP as BOREP
    from .certified_problem import CertifiedProblem as CertifiedProblem
    from .conjugate_gradient import LinearSolverError as LinearSolverError
    from .conjugate_gradient import batched_conjugate_gradient as batched_conjugate_gradient
    from .constants import Estimated as Estimated
    from .constants import Known as Known
    from .conversion import collapse as collapse
    from .conversion import convert as convert
    from .conversion import response_parameters as response_parameters
    from .conversion import response_state as response_state
    from .fixed_accuracy import FixedArmijo as FixedArmijo
    from .fixed_accuracy import FixedStep as FixedStep
    from .hoag import HOAG as HOAG
    from .hyper_dropout import HyperDropout as HyperDropout
    from .hyper_dropout import HyperDropout2d as HyperDropout2d
    from .hypergradient import hypergradient_error_bound as hypergradient_error_bound
    from .hypergradient import implicit_hypergradient as implicit_hypergradient
    from .implicit_argmin import argmin as argmin
    from .implicit_differentiation import ImplicitDifferentiation as ImplicitDifferentiation
    from .inexact_records import MaidInfo as MaidInfo
    from .lower_level import LowerLevel as LowerLevel
    from .lower_level import UpperLoss as UpperLoss
    from .maid import MAID as MAID
    from .normalized_momentum import NormalizedMomentum as NormalizedMomentum
    from .perturbation import perturbation_entropy as perturbation_entropy
    from .random_search import RandomSearch as RandomSearch
    from .response_functions import response_linear as response_linear
    from .response_functions import response_squared_norm as response_squared_norm
    from .response_functions import response_weight as response_weight
    from .response_input import ResponseState as ResponseState
    from .sample_weights import SampleWeights as SampleWeights
    from .sample_weights import weighted_mean as weighted_mean
    from .schedule import ReplaySchedule as ReplaySchedule
    from .schedule import Schedule as Schedule
    from .search import Search as Search
    from .search_trial import SearchTrial as SearchTrial
    from .self_tuning import SelfTuner as SelfTuner
    from .single_loop import clipped_ma_soba as clipped_ma_soba
    from .single_loop import ma_soba as ma_soba
    from .single_loop import normalized_ma_soba as normalized_ma_soba
    from .single_loop import soba as soba
    from .stocbio import StocBiO as StocBiO
    from .strongly_convex import InnerSolverError as InnerSolverError
    from .strongly_convex import solve_strongly_convex as solve_strongly_convex
    from .unrolled import OneStepUnrolled as OneStepUnrolled
    from .upper_values import upper_parameters as upper_parameters

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "conversion": ["collapse", "convert", "response_parameters", "response_state"],
        "hyper_dropout": ["HyperDropout", "HyperDropout2d"],
        "perturbation": ["perturbation_entropy"],
        "response_functions": ["response_linear", "response_squared_norm", "response_weight"],
        "response_input": ["ResponseState"],
        "schedule": ["ReplaySchedule", "Schedule"],
        "self_tuning": ["SelfTuner"],
        "conjugate_gradient": ["LinearSolverError", "batched_conjugate_gradient"],
        "bo_rep": ["BOREP"],
        "certified_problem": ["CertifiedProblem"],
        "constants": ["Estimated", "Known"],
        "fixed_accuracy": ["FixedArmijo", "FixedStep"],
        "hoag": ["HOAG"],
        "hypergradient": ["hypergradient_error_bound", "implicit_hypergradient"],
        "implicit_argmin": ["argmin"],
        "implicit_differentiation": ["ImplicitDifferentiation"],
        "inexact_records": ["MaidInfo"],
        "lower_level": ["LowerLevel", "UpperLoss"],
        "maid": ["MAID"],
        "normalized_momentum": ["NormalizedMomentum"],
        "random_search": ["RandomSearch"],
        "sample_weights": ["SampleWeights", "weighted_mean"],
        "search": ["Search"],
        "search_trial": ["SearchTrial"],
        "single_loop": ["clipped_ma_soba", "ma_soba", "normalized_ma_soba", "soba"],
        "stocbio": ["StocBiO"],
        "strongly_convex": ["InnerSolverError", "solve_strongly_convex"],
        "unrolled": ["OneStepUnrolled"],
        "upper_values": ["upper_parameters"],
    },
)

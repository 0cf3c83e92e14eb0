"""Methods that learn hyperparameters: tuners of bilevel problems, and what they are made of."""

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .bo_rep import BOREP as BOREP
    from .implicit_differentiation import ImplicitDifferentiation as ImplicitDifferentiation
    from .normalized_momentum import NormalizedMomentum as NormalizedMomentum
    from .sample_weights import SampleWeights as SampleWeights
    from .sample_weights import weighted_mean as weighted_mean
    from .single_loop import clipped_ma_soba as clipped_ma_soba
    from .single_loop import ma_soba as ma_soba
    from .single_loop import normalized_ma_soba as normalized_ma_soba
    from .single_loop import soba as soba
    from .stocbio import StocBiO as StocBiO
    from .unrolled import OneStepUnrolled as OneStepUnrolled
    from .upper_parameters import upper_parameters as upper_parameters

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "bo_rep": ["BOREP"],
        "implicit_differentiation": ["ImplicitDifferentiation"],
        "normalized_momentum": ["NormalizedMomentum"],
        "sample_weights": ["SampleWeights", "weighted_mean"],
        "single_loop": ["clipped_ma_soba", "ma_soba", "normalized_ma_soba", "soba"],
        "stocbio": ["StocBiO"],
        "unrolled": ["OneStepUnrolled"],
        "upper_parameters": ["upper_parameters"],
    },
)

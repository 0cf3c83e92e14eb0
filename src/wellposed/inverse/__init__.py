"""Inverse problems: priors and the pieces of variational models, as functions on tensors."""

# No file here is named after its function: importing the file would put the module in the function's place.

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .field_of_experts import field_of_experts_prior as field_of_experts_prior
    from .field_of_experts import field_of_experts_smoothness as field_of_experts_smoothness
    from .total_variation import TotalVariationCurvature as TotalVariationCurvature
    from .total_variation import finite_differences as finite_differences
    from .total_variation import negative_divergence as negative_divergence
    from .total_variation import smoothed_total_variation as smoothed_total_variation
    from .total_variation import smoothed_total_variation_gradient as smoothed_total_variation_gradient

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "field_of_experts": ["field_of_experts_prior", "field_of_experts_smoothness"],
        "total_variation": [
            "TotalVariationCurvature",
            "finite_differences",
            "negative_divergence",
            "smoothed_total_variation",
            "smoothed_total_variation_gradient",
        ],
    },
)

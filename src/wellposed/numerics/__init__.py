"""Linear algebra that methods share: curvature products, Krylov methods, per-example gradients, the simplex."""

# No file here is named after its function: importing the file would put the module in the function's place.

from typing import TYPE_CHECKING

import lazy_loader as lazy

if TYPE_CHECKING:
    from .dropout_masks import dropout_rows as dropout_rows
    from .eigenvalues import Lanczos as Lanczos
    from .eigenvalues import PowerIteration as PowerIteration
    from .eigenvalues import lanczos as lanczos
    from .eigenvalues import power_iteration as power_iteration
    from .hessian import hessian_vector_product as hessian_vector_product
    from .linear_solve import ConjugateGradient as ConjugateGradient
    from .linear_solve import conjugate_gradient as conjugate_gradient
    from .per_example import per_example_gradients as per_example_gradients
    from .simplex import project_to_simplex as project_to_simplex
    from .tree import flatten as flatten
    from .tree import global_norm as global_norm
    from .tree import inner_product as inner_product
    from .tree import unflatten as unflatten

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "dropout_masks": ["dropout_rows"],
        "eigenvalues": ["Lanczos", "PowerIteration", "lanczos", "power_iteration"],
        "hessian": ["hessian_vector_product"],
        "linear_solve": ["ConjugateGradient", "conjugate_gradient"],
        "per_example": ["per_example_gradients"],
        "simplex": ["project_to_simplex"],
        "tree": ["flatten", "global_norm", "inner_product", "unflatten"],
    },
)

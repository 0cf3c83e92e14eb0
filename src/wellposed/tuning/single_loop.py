"""Single-loop bilevel methods by name: SOBA, MA-SOBA and its normalised and clipped forms, as settings of `BOREP`.

All of them take one step of the parameters, one of the linear system and one of the hyperparameters in each iteration.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..bilevel import BilevelProblem
from .bo_rep import BOREP

_ONE_LOOP: dict[str, Any] = {"period": 1, "inner_steps": 1, "refine_steps": 0}


def soba(problem: BilevelProblem, outer_lr: float | Tensor, inner_lr: float, z_lr: float, **options: Any) -> BOREP:
    """SOBA (Dagréou et al. 2022, arXiv 2201.13409): all three variables move together, without momentum.

    Args:
        problem: see `BOREP`.
        outer_lr: step size of the hyperparameters.
        inner_lr: step size of the parameters.
        z_lr: step size of the linear system.
        options: further arguments of `BOREP`.

    Example:
        >>> from wellposed import BilevelProblem, Hyperparameter
        >>> loss = lambda w, v, b: (v["h"] * w["w"].square()).sum()
        >>> w = {"w": __import__("torch").ones(1, requires_grad=True)}
        >>> tuner = soba(BilevelProblem(None, loss, loss, w, {"h": Hyperparameter(1.0)}), 0.1, 0.1, 0.1)
        >>> tuner.mode, tuner.beta, tuner.order
        ('plain', 0.0, 'jacobi')
    """
    return ma_soba(problem, outer_lr, inner_lr, z_lr, beta=0.0, **options)


def ma_soba(
    problem: BilevelProblem, outer_lr: float | Tensor, inner_lr: float, z_lr: float, beta: float = 0.9, **options: Any
) -> BOREP:
    """MA-SOBA (Chen et al. 2023, arXiv 2306.12067): SOBA with a moving average of the hypergradient.

    Args:
        problem, outer_lr, inner_lr, z_lr, options: see `soba`.
        beta: share of the old average, in [0, 1).

    Example:
        >>> from wellposed import BilevelProblem, Hyperparameter
        >>> loss = lambda w, v, b: (v["h"] * w["w"].square()).sum()
        >>> w = {"w": __import__("torch").ones(1, requires_grad=True)}
        >>> ma_soba(BilevelProblem(None, loss, loss, w, {"h": Hyperparameter(1.0)}), 0.1, 0.1, 0.1).beta
        0.9
    """
    chosen = {**_ONE_LOOP, "mode": "plain", "order": "jacobi", **options}
    return BOREP(problem, outer_lr, inner_lr, z_lr, beta, **chosen)


def normalized_ma_soba(
    problem: BilevelProblem, outer_lr: float | Tensor, inner_lr: float, z_lr: float, beta: float = 0.9, **options: Any
) -> BOREP:
    """Normalised MA-SOBA: what is left of BO-REP without refinement and periods; its control.

    Args:
        problem, outer_lr, inner_lr, z_lr, beta, options: see `ma_soba`.

    Example:
        >>> from wellposed import BilevelProblem, Hyperparameter
        >>> loss = lambda w, v, b: (v["h"] * w["w"].square()).sum()
        >>> w = {"w": __import__("torch").ones(1, requires_grad=True)}
        >>> normalized_ma_soba(BilevelProblem(None, loss, loss, w, {"h": Hyperparameter(1.0)}), 0.1, 0.1, 0.1).mode
        'normalized'
    """
    return ma_soba(problem, outer_lr, inner_lr, z_lr, beta, **{"mode": "normalized", **options})


def clipped_ma_soba(
    problem: BilevelProblem,
    outer_lr: float | Tensor,
    inner_lr: float,
    z_lr: float,
    clip: float | Tensor,
    beta: float = 0.9,
    **options: Any,
) -> BOREP:
    """Clipped MA-SOBA: the average is scaled down to norm `clip` where it is larger; what practitioners do.

    Args:
        problem, outer_lr, inner_lr, z_lr, beta, options: see `ma_soba`.
        clip: largest norm, > 0.

    Example:
        >>> from wellposed import BilevelProblem, Hyperparameter
        >>> loss = lambda w, v, b: (v["h"] * w["w"].square()).sum()
        >>> w = {"w": __import__("torch").ones(1, requires_grad=True)}
        >>> clipped_ma_soba(BilevelProblem(None, loss, loss, w, {"h": Hyperparameter(1.0)}), 0.1, 0.1, 0.1, 5.0).clip
        5.0
    """
    return ma_soba(problem, outer_lr, inner_lr, z_lr, beta, **{"mode": "clipped", "clip": clip, **options})

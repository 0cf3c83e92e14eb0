"""The share of the leading singular values in the spectrum of a batch's logits, and cheap ways to the same number."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .logit_rows import float_logits
from .shared_rows import Rows

Norm = Literal["nuclear", "frobenius"]
Method = Literal["auto", "exact", "randomized"]

NORMS: tuple[Norm, ...] = ("nuclear", "frobenius")
METHODS: tuple[Method, ...] = ("auto", "exact", "randomized")
_SMALL = 1e-8
_WIDE = 4096
_HERE = Rows()


def spectral_concentration(
    logits: Float[Tensor, "rows classes"],
    k: int,
    norm: Norm = "nuclear",
    method: Method = "exact",
    seed: int = 0,
    where: Rows = _HERE,
) -> Float[Tensor, ""]:
    """Minus the sum of the k largest singular values, divided by a norm of the matrix; in at least float32.

    BA-LoRA's spectral term (arXiv 2408.04556). The two norms are two objectives. With the nuclear norm (all singular
    values, understanding tasks) the value lies in [-1, -k / min(rows, classes)], is -1 for EVERY matrix of rank <= k, and
    then has no gradient: with fewer than k classes the term does nothing. With the Frobenius norm (generation) it lies in
    [-sqrt(k), 0) and is least where the k leading values are equal and the rest are zero: a flat top of the spectrum.

    The gradient is the sum of `u_i v_i'`, without differences of singular values in a denominator.

    Args:
        logits: (rows, classes): examples or valid tokens of a batch, or the same matrix in a basis of its columns
            (`logits_in_head_basis`). Fewer than two rows, or a norm below 1e-8, give 0.
        k: number of leading values, >= 1.
        norm: "nuclear" or "frobenius".
        method: "exact"; "randomized" (a random projection with two power iterations, Frobenius only; it finds up to a few
            percent less on a flat spectrum); "auto": randomized beyond 4096 columns with the Frobenius norm, else exact.
        seed: of the projection: no global random number is drawn, and the same matrix gives the same value.
        where: whether other ranks hold further rows of the matrix. Exact values need all of them on every rank;
            randomized ones exchange only what is as narrow as the projection.

    Raises:
        ValueError: for an argument out of range.
        torch.linalg.LinAlgError: where the decomposition fails, e.g. for logits that are not finite.

    Example:
        >>> spectral_concentration(torch.diag(torch.tensor([3.0, 1.0])), k=1)
        tensor(-0.7500)
    """
    check_spectrum("spectral_concentration", k, norm, method)
    z = float_logits(logits)
    rows, columns = where.count(z), z.shape[1]
    if rows < 2:
        return z.new_zeros(())
    wide = norm == "frobenius" and columns > _WIDE and k < min(rows, columns)
    if method == "randomized" or (method == "auto" and wide):
        values = randomized_singular_values(z, k, seed=seed, where=where)
    else:
        z, where = where.join(z), _HERE
        values = torch.linalg.svdvals(z)
    size = values.sum() if norm == "nuclear" else where.norm(z)
    # A comparison on the device: no synchronisation, and no division by zero on either branch.
    return torch.where(size < _SMALL, 0.0, -values[:k].sum() / size.clamp(min=_SMALL))


def randomized_singular_values(
    matrix: Float[Tensor, "rows columns"],
    k: int,
    oversampling: int = 5,
    iterations: int = 2,
    seed: int = 0,
    where: Rows = _HERE,
) -> Float[Tensor, " values"]:
    """The k largest singular values, approximately and from below (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4).

    The subspace is found without gradient; in it the values are exact, and their gradient is that of the projected matrix.

    Args:
        matrix: any.
        k: how many, cut to min(rows, columns).
        oversampling: further columns of the projection.
        iterations: power iterations.
        seed: of the projection.
        where: whether other ranks hold further rows of the matrix.

    Example:
        >>> matrix = torch.diag(torch.tensor([3.0, 1.0]))
        >>> torch.allclose(randomized_singular_values(matrix, k=1), torch.tensor([3.0]))
        True
    """
    width = min(k + oversampling, where.count(matrix), matrix.shape[1])
    with torch.no_grad():
        generator = torch.Generator(matrix.device).manual_seed(seed)
        start = torch.randn(
            matrix.shape[1], width, generator=generator, device=matrix.device, dtype=matrix.dtype
        )  # fmt: skip
        basis = where.own(torch.linalg.qr(where.join(matrix @ start)).Q)
        for _ in range(iterations):
            other = torch.linalg.qr(where.total(matrix.T @ basis)).Q
            basis = where.own(torch.linalg.qr(where.join(matrix @ other)).Q)
    return torch.linalg.svdvals(where.total(basis.T @ matrix))[:k]


def head_factor(
    weight: Float[Tensor, "classes features"], bias: Float[Tensor, " classes"] | None = None
) -> Float[Tensor, "basis inputs"]:
    """R of the thin QR decomposition of a frozen output layer `[W, b]`; computed once, for `logits_in_head_basis`.

    Args:
        weight: W, (classes, features).
        bias: b, (classes,), or None.

    Returns:
        (min(classes, features), features), with one more of each for a bias; in at least float32.

    Example:
        >>> head_factor(torch.randn(100, 3)).shape
        torch.Size([3, 3])
    """
    w = float_logits(weight.detach())
    if bias is not None:
        w = torch.cat([w, bias.detach().to(w.dtype)[:, None]], 1)
    return torch.linalg.qr(w, mode="r").R


def logits_in_head_basis(
    hidden: Float[Tensor, "rows features"], factor: Float[Tensor, "basis inputs"]
) -> Float[Tensor, "rows basis"]:
    """`[H, 1] R'`: a matrix with the singular values and the Frobenius norm of the logits `H W' + b`, exactly.

    With `[W, b] = QR` the logits are `[H, 1] R' Q'`, and Q has orthonormal columns. A vocabulary of 32,000 shrinks to the
    width of the network; the gradients in H are the same.

    Args:
        hidden: H, inputs of the output layer.
        factor: R, from `head_factor`; one column more than H has means that the layer has a bias.

    Raises:
        ValueError: if the widths do not fit.

    Example:
        >>> weight, hidden = torch.randn(50, 3), torch.randn(7, 3)
        >>> cheap = logits_in_head_basis(hidden, head_factor(weight))
        >>> torch.allclose(torch.linalg.svdvals(cheap), torch.linalg.svdvals(hidden @ weight.T)[:3], atol=1e-4)
        True
    """
    h = float_logits(hidden)
    extra = factor.shape[1] - h.shape[1]
    if extra not in (0, 1):
        raise ValueError(
            f"logits_in_head_basis: factor must have {h.shape[1]} columns (one more with a bias), got {factor.shape[1]}"
        )
    if extra:
        h = torch.cat([h, h.new_ones(len(h), 1)], 1)
    return h @ factor.to(h).T


def check_spectrum(owner: str, k: int, norm: str, method: str) -> None:
    """Raise for a number of values, a norm or a method out of range."""
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"{owner}: k must be an integer >= 1, got {k!r}")
    if norm not in NORMS:
        raise ValueError(f"{owner}: norm must be one of {list(NORMS)}, got {norm!r}")
    if method not in METHODS:
        raise ValueError(f"{owner}: method must be one of {list(METHODS)}, got {method!r}")
    if method == "randomized" and norm == "nuclear":
        raise ValueError(
            f"{owner}: method 'randomized' finds the leading singular values alone, so norm must be 'frobenius', got "
            "'nuclear'"
        )

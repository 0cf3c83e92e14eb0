"""A list of tensors (the parameters of a model) seen as one vector."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def flatten(tensors: Iterable[Tensor]) -> Float[Tensor, " total"]:
    """Concatenate ``tensors`` (at least one, of one dtype and device) into one vector; differentiable.

    Example:
        >>> flatten([torch.ones(2, 2), torch.zeros(1)])
        tensor([1., 1., 1., 1., 0.])
    """
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(vector: Float[Tensor, " total"], like: Iterable[Tensor]) -> list[Tensor]:
    """Cut ``vector`` into views with the shapes of ``like``: the inverse of :func:`flatten`.

    Raises:
        ValueError: if the lengths do not add up.

    Example:
        >>> [tuple(part.shape) for part in unflatten(torch.arange(5.0), [torch.ones(2, 2), torch.zeros(1)])]
        [(2, 2), (1,)]
    """
    shapes = [tensor.shape for tensor in like]
    sizes = [math.prod(shape) for shape in shapes]
    if vector.ndim != 1 or len(vector) != sum(sizes):
        raise ValueError(f"unflatten: vector must have shape ({sum(sizes)},), got {tuple(vector.shape)}")
    return [part.view(shape) for part, shape in zip(torch.split(vector, sizes), shapes, strict=True)]


def global_norm(tensors: Iterable[Tensor]) -> Float[Tensor, ""]:
    """Euclidean norm of all ``tensors`` together, by one fused operation a device.

    Half-precision tensors are accumulated in float32: the square of a gradient of 300 already overflows float16.
    Tensors on several devices are combined on that of the first. The norm of nothing is 0.

    Example:
        >>> global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    items = [tensor.detach() for tensor in tensors]
    if not items:
        return torch.zeros(())
    dtype = torch.promote_types(torch.float32, _widest(items))
    norms = torch._foreach_norm(items, 2, dtype=dtype)
    norm: Tensor = torch.linalg.vector_norm(torch.stack([part.to(items[0].device) for part in norms]))
    return norm


def inner_product(left: Iterable[Tensor], right: Iterable[Tensor]) -> Float[Tensor, ""]:
    """Sum over all entries of ``left * right``, accumulated in at least float32; differentiable.

    Raises:
        ValueError: if the two do not hold the same shapes.

    Example:
        >>> inner_product([torch.tensor([1.0, 2.0]), torch.tensor(3.0)], [torch.tensor([4.0, 5.0]), torch.tensor(6.0)])
        tensor(32.)
    """
    pairs = list(zip(left, right, strict=True))
    if not pairs:
        return torch.zeros(())
    for a, b in pairs:
        if a.shape != b.shape:
            raise ValueError(f"inner_product: shapes must agree, got {tuple(a.shape)} and {tuple(b.shape)}")
    dtype = torch.promote_types(torch.float32, _widest([tensor for pair in pairs for tensor in pair]))
    device = pairs[0][0].device
    # Multiply and sum, not torch.dot: a dot of float32 vectors may run in TF32 on a GPU.
    return torch.stack([(a.to(dtype) * b.to(dtype)).sum().to(device) for a, b in pairs]).sum()


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype

"""Small pictures whose classes are compositions: a shape, a colour, a quadrant and a size, in three domains.

A class that was never tuned on shares each of its attributes with classes that were, so that a paired image and text
network can recognise it: what base-to-novel generalisation asks for, at the price of seconds.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

SHAPES, COLOURS, QUADRANTS, SIZES = 4, 5, 4, 4
ATTRIBUTES = (SHAPES, COLOURS, QUADRANTS, SIZES)
CLASSES = SHAPES * COLOURS * QUADRANTS * SIZES
SIDE = 10
PIXELS = 3 * SIDE * SIDE
PALETTE = ((1.0, 0.1, 0.1), (0.1, 1.0, 0.1), (0.1, 0.1, 1.0), (1.0, 1.0, 0.1), (1.0, 0.1, 1.0))
TARGET_GAIN = (0.6, 1.1, 0.8)
OTHER_GAIN = (1.1, 0.7, 0.6)


def attributes_of(classes: Int[Tensor, " n"]) -> Int[Tensor, "n 4"]:
    """Shape, colour, quadrant and size of classes 0 to 319.

    Example:
        >>> attributes_of(torch.tensor([0, 1, 319])).tolist()
        [[0, 0, 0, 0], [0, 0, 0, 1], [3, 4, 3, 3]]
    """
    found = []
    for count in reversed(ATTRIBUTES):
        found.append(classes % count)
        classes = classes // count
    return torch.stack(found[::-1], 1)


def draw_images(
    classes: Int[Tensor, " n"], generator: torch.Generator, domain: int = 0, strength: float = 1.0
) -> Float[Tensor, "n 300"]:
    """One 10x10 colour picture of each class, channels first and flattened.

    The object is a disc, a square, a diamond or a cross around a shaken centre of its quadrant, of a shaken radius and
    colour; every pixel has noise of 0.25 on a background of 0.

    Args:
        classes: 0 to 319.
        generator: of all that is random.
        domain: 0 is plain. 1 scales the channels and adds light from one side; 2 scales them otherwise, adds light from
            below, and more noise.
        strength: how far domain 1 goes, from 0 (plain) to 1.

    Raises:
        ValueError: for another domain.

    Example:
        >>> draw_images(torch.tensor([0, 319]), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 300])
    """
    if domain not in (0, 1, 2):
        raise ValueError(f"draw_images: domain must be 0, 1 or 2, got {domain}")
    n = len(classes)
    shape, colour, quadrant, size = attributes_of(classes).unbind(1)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(n, *sizes, generator=generator)

    centre = torch.stack([quadrant % 2, quadrant // 2], 1) * 4.0 + 2.5 + 0.6 * normal(2)
    radius = ((1.2 + 0.6 * size) * (1 + 0.1 * normal(1)[:, 0]))[:, None, None]
    place = torch.arange(SIDE, dtype=torch.float32)
    dx = (place[None, None, :] - centre[:, 0, None, None]).abs()
    dy = (place[None, :, None] - centre[:, 1, None, None]).abs()
    nearer, farther = torch.minimum(dx, dy), torch.maximum(dx, dy)
    inside = torch.stack(
        [
            dx**2 + dy**2 < radius**2,
            farther < 0.85 * radius,
            dx + dy < 1.2 * radius,
            (nearer < 0.35 * radius) & (farther < radius),
        ]
    )
    mask = inside[shape, torch.arange(n)]
    paint = torch.tensor(PALETTE)[colour] + 0.15 * normal(3)
    images = mask[:, None] * paint[:, :, None, None] + 0.25 * normal(3, SIDE, SIDE)
    return _in_domain(images, domain, strength, place, generator).reshape(n, PIXELS)


def _in_domain(images: Tensor, domain: int, strength: float, place: Tensor, generator: torch.Generator) -> Tensor:
    if domain == 1:
        gain = 1 + strength * (torch.tensor(TARGET_GAIN) - 1)
        return images * gain[:, None, None] + strength * (0.3 + 0.15 * place / SIDE)
    if domain == 2:
        noise = 0.15 * torch.randn(images.shape, generator=generator)
        gained = images * torch.tensor(OTHER_GAIN)[:, None, None]
        return gained - 0.2 + 0.25 * place[:, None] / SIDE + noise
    return images

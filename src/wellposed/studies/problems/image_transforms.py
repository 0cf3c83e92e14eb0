"""Transforms of whole batches of images, for `TensorLoader(transform=)`: normalisation, crops and flips."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor


class Normalise:
    """Bytes to floats of mean 0 and standard deviation 1 a channel, for `TensorLoader(transform=)`.

    Args:
        images: uint8 (examples, channels, height, width), from which mean and deviation are taken.

    Example:
        >>> images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
        >>> float(Normalise(images)(images, torch.Generator()).mean().abs()) < 1e-5
        True
    """

    def __init__(self, images: UInt8[Tensor, "examples channels height width"]) -> None:
        counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.transpose(0, 1)])
        # From exact counts: float32 sums over 50,000 images would lose digits.
        shares = counts.double() / counts.sum(1, keepdim=True)
        levels = torch.arange(256, dtype=torch.float64, device=images.device)
        mean = (shares * levels).sum(1)
        deviation = ((shares * levels.square()).sum(1) - mean.square()).clamp(min=1.0).sqrt()
        self.mean, self.deviation = (t.float()[:, None, None] for t in (mean, deviation))

    def __call__(
        self, images: UInt8[Tensor, "batch channels height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch channels height width"]:
        """Normalised images."""
        return (images.float() - self.mean.to(images.device)) / self.deviation.to(images.device)


class CropAndFlip:
    """A random crop of each image with a black margin, half of them mirrored, then `then`; for a whole batch at once.

    Args:
        then: what follows, e.g. `Normalise(images)`.
        margin: pixels added on each side before an image of the old size is cut out.

    Example:
        >>> images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
        >>> CropAndFlip(Normalise(images))(images, torch.Generator().manual_seed(0)).shape
        torch.Size([8, 3, 32, 32])
    """

    def __init__(self, then: Normalise | None = None, margin: int = 4) -> None:
        if margin < 0:
            raise ValueError(f"CropAndFlip: margin must be >= 0, got {margin}")
        self.then, self.margin = then, margin

    def __call__(
        self, images: UInt8[Tensor, "batch channels height width"], generator: torch.Generator
    ) -> Shaped[Tensor, "batch channels height width"]:
        """Augmented images."""
        count, channels, height, width = images.shape
        offsets = torch.randint(0, 2 * self.margin + 1, (2, count, 1), generator=generator)
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        rows = offsets[0] + torch.arange(height)
        columns = offsets[1] + torch.arange(width)
        columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(images, [self.margin] * 4)
        # One gather for all images: rows (batch, 1, height, 1) and columns (batch, 1, 1, width) broadcast.
        device = images.device
        picked = padded[
            torch.arange(count, device=device)[:, None, None, None],
            torch.arange(channels, device=device)[None, :, None, None],
            rows.to(device)[:, None, :, None],
            columns.to(device)[:, None, None, :],
        ]
        return picked if self.then is None else self.then(picked, generator)

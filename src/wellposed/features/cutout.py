"""Cutout: square holes in the images of training."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..batching import map_tensors
from ..hyperparameter import Hyperparameter, check_strength, value_of
from ..regularizer import Regularizer
from ..step import Step


def cut_holes(
    images: Float[Tensor, "batch channels height width"],
    holes: Int[Tensor, " batch"],
    length: Int[Tensor, " batch"],
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Zero square holes around random centres; a hole may reach over the border (DeVries and Taylor 2017).

    Args:
        images: (batch, channels, height, width).
        holes: how many, for each example, >= 0.
        length: side in pixels, for each example, >= 0.
        generator: of the centres, on the CPU.

    Example:
        >>> images = cut_holes(torch.ones(2, 1, 8, 8), torch.tensor([0, 1]), torch.tensor([3, 3]))
        >>> bool((images[0] == 1).all()), bool((images[1] == 0).any())
        (True, True)
    """
    batch, _, height, width = images.shape
    most = int(holes.max()) if batch else 0
    if most == 0:
        return images
    device = images.device
    top, left = (
        torch.randint(size, (batch, most), generator=generator).to(device) - length[:, None] // 2
        for size in (height, width)
    )
    used = torch.arange(most, device=device) < holes[:, None]

    def covered(start: Tensor, size: int) -> Tensor:
        places = torch.arange(size, device=device)
        return (places >= start[..., None]) & (places < (start + length[:, None])[..., None])

    rows, columns = covered(top, height) & used[..., None], covered(left, width)
    hidden = (rows[..., :, None] & columns[..., None, :]).any(1)
    return images.masked_fill(hidden[:, None], 0.0)


class Cutout(Regularizer):
    """Cutout (DeVries and Taylor 2017, arXiv 1708.04552): hide square holes of the images, anew in every training step.

    Args:
        holes: holes in each image, >= 0.
        length: their side in pixels, >= 0. Either may be a `Hyperparameter` with `discrete=True`: training sees its
            floor, with `per_example=True` possibly another one for each image. Over the range (0, 4) that is 0, 1, 2, 3.

    Raises:
        ValueError: for a negative number, or a Hyperparameter that is not discrete; in training, unless the inputs are
            images (batch, channels, height, width).
        TypeError: for a number that is not whole.

    Example:
        >>> step = Step(torch.nn.Identity(), inputs=torch.ones(4, 3, 16, 16))
        >>> Cutout(holes=1, length=6).on_batch(step)
        >>> bool((step.inputs == 0).any())
        True
    """

    def __init__(self, holes: float | Hyperparameter = 1, length: float | Hyperparameter = 4) -> None:
        super().__init__()
        for name, value in (("holes", holes), ("length", length)):
            if isinstance(value, Hyperparameter):
                check_strength("Cutout", name, value)
                if not value.discrete:
                    raise ValueError(f"Cutout: {name} must be whole; give its Hyperparameter discrete=True")
            elif isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Cutout: {name} must be an integer or a Hyperparameter, got {value!r}")
            elif value < 0:
                raise ValueError(f"Cutout: {name} must be >= 0, got {value}")
        self.holes, self.length = holes, length

    def on_batch(self, step: Step) -> None:
        def cut(images: Tensor) -> Tensor:
            if images.ndim != 4 or not images.is_floating_point():
                raise ValueError(
                    f"Cutout: inputs must be images (batch, channels, height, width), got {tuple(images.shape)}"
                )
            counts = [
                torch.as_tensor(value_of(value), device=images.device).detach().long().expand(len(images))
                for value in (self.holes, self.length)
            ]
            return cut_holes(images, counts[0], counts[1], step.generator)

        step.inputs = map_tensors(cut, step.inputs)

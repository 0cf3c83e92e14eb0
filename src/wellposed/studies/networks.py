"""Convolutional networks for 32x32 images, each from a table of depths and widths: ResNet, pre-activation ResNet, VGG.

The stem is a 3x3 convolution of stride 1, as everywhere in the literature on CIFAR; global average pooling ends the
features, so that other image sizes fit, too. All layers keep torch's own initialisation.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

STAGE_WIDTHS = (64, 128, 256, 512)
VGG_WIDTHS = (64, 128, 256, 512, 512)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, arXiv 1512.03385)."""

    expansion = 1
    normalises_first = False

    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _convolution(fan_in, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = _convolution(width, width, 3), nn.BatchNorm2d(width)
        self.shortcut = _shortcut(fan_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the last one has four times as many channels."""

    expansion = 4
    normalises_first = False

    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        fan_out = self.expansion * width
        self.conv1, self.norm1 = _convolution(fan_in, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = _convolution(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = _convolution(width, fan_out, 1), nn.BatchNorm2d(fan_out)
        self.shortcut = _shortcut(fan_in, fan_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        h = F.relu(self.norm2(self.conv2(h)))
        return F.relu(self.norm3(self.conv3(h)) + self.shortcut(x))


class PreActivationBlock(nn.Module):
    """Normalisation and ReLU come before each convolution (He et al. 2016, arXiv 1603.05027).

    Where the shape changes, a bare 1x1 convolution of the activated input is the shortcut; elsewhere the input itself.
    """

    expansion = 1
    normalises_first = True

    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(fan_in), _convolution(fan_in, width, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), _convolution(width, width, 3)
        self.shortcut = _convolution(fan_in, width, 1, stride) if stride > 1 or fan_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm1(x))
        kept = x if self.shortcut is None else self.shortcut(activated)
        return self.conv2(F.relu(self.norm2(self.conv1(activated)))) + kept


Block = type[BasicBlock] | type[Bottleneck] | type[PreActivationBlock]


class ResidualNetwork(nn.Module):
    """Four stages of residual blocks, of which all but the first halve the resolution.

    Args:
        block: of which it is built. With `PreActivationBlock` neither the stem nor the last features are normalised.
        depths: blocks in each stage.
        num_classes: outputs.
        width: factor on all numbers of channels, 64 in the first stage.
        bias: whether the linear head has one.

    Example:
        >>> net = ResidualNetwork(BasicBlock, [1, 1, 1, 1], num_classes=10, width=1 / 16)
        >>> net(torch.zeros(2, 3, 32, 32)).shape, net.head.in_features
        (torch.Size([2, 10]), 32)
    """

    def __init__(
        self, block: Block, depths: Sequence[int], num_classes: int, width: float = 1.0, *, bias: bool = True
    ) -> None:
        super().__init__()
        widths = [_scaled(channels, width) for channels in STAGE_WIDTHS]
        stem: list[nn.Module] = [_convolution(3, widths[0], 3)]
        self.stem = nn.Sequential(*stem if block.normalises_first else [*stem, nn.BatchNorm2d(widths[0]), nn.ReLU()])
        fan_in, stages = widths[0], []
        for number, (channels, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks: list[nn.Module] = []
            for position in range(depth):
                stride = 2 if number > 0 and position == 0 else 1
                blocks.append(block(fan_in, channels, stride))
                fan_in = block.expansion * channels
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(fan_in, num_classes, bias=bias)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class VGG(nn.Module):
    """Five stages of 3x3 convolutions with batch norm, each followed by pooling (Simonyan and Zisserman 2015).

    Args:
        depths: convolutions in each stage.
        num_classes: outputs.
        width: factor on all numbers of channels, 64 in the first stage.
        hidden: widths of fully connected layers before the head, e.g. (4096, 4096) as in the original.
        dropout: in front of every layer that follows a hidden one.
        bias: whether the linear head has one.

    Example:
        >>> net = VGG([1, 1, 1, 1, 1], num_classes=10, width=1 / 16, hidden=(64,))
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int,
        width: float = 1.0,
        *,
        hidden: Sequence[int] = (),
        dropout: float = 0.5,
        bias: bool = True,
    ) -> None:
        super().__init__()
        fan_in = 3
        layers: list[nn.Module] = []
        for channels, depth in zip(VGG_WIDTHS, depths, strict=True):
            for _ in range(depth):
                fan_out = _scaled(channels, width)
                layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.BatchNorm2d(fan_out), nn.ReLU()]
                fan_in = fan_out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        sizes = [fan_in, *(_scaled(units, width) for units in hidden)]
        connected: list[nn.Module] = []
        for size, units in pairwise(sizes):
            connected += [nn.Linear(size, units), nn.ReLU(), nn.Dropout(dropout)]
        self.hidden = nn.Sequential(*connected)
        self.head = nn.Linear(sizes[-1], num_classes, bias=bias)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self.head(self.hidden(self.features(x).mean((2, 3))))


def _residual(block: Block, *depths: int) -> Callable[..., nn.Module]:
    return lambda *args, **options: ResidualNetwork(block, depths, *args, **options)


def _vgg(*depths: int) -> Callable[..., nn.Module]:
    return lambda *args, **options: VGG(depths, *args, **options)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": _residual(BasicBlock, 2, 2, 2, 2),
    "resnet34": _residual(BasicBlock, 3, 4, 6, 3),
    "resnet50": _residual(Bottleneck, 3, 4, 6, 3),
    "preact_resnet18": _residual(PreActivationBlock, 2, 2, 2, 2),
    "vgg16_bn": _vgg(2, 2, 3, 3, 3),
    "vgg19_bn": _vgg(2, 2, 4, 4, 4),
}
"""By name: functions of num_classes and width, and of what `ResidualNetwork` and `VGG` take by name."""


def build_network(
    name: str,
    num_classes: int,
    *,
    width: float = 1.0,
    bias: bool = True,
    seed: int | None = None,
    hidden: Sequence[int] = (),
) -> nn.Module:
    """A network of `NETWORKS`.

    Args:
        name: e.g. "resnet18".
        num_classes: outputs, >= 1.
        width: factor on all numbers of channels, > 0; at least one channel is left.
        bias: whether the linear head has one.
        seed: of the initialisation; torch's global random state is given back. None draws from that state.
        hidden: for VGG, widths of fully connected layers before the head.

    Raises:
        ValueError: for an unknown name, an argument out of range, or `hidden` without a VGG.

    Example:
        >>> sum(p.numel() for p in build_network("resnet18", 10, width=1 / 16, seed=0).parameters())
        44622
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"build_network: name must be one of {list(NETWORKS)}, got {name!r}{hint}")
    if num_classes < 1 or not width > 0:
        raise ValueError(
            f"build_network: num_classes must be >= 1 and width > 0, got num_classes={num_classes}, width={width}"
        )
    if hidden and not name.startswith("vgg"):
        raise ValueError(f"build_network: hidden belongs to VGG, got hidden={tuple(hidden)} for {name!r}")
    options = {"hidden": tuple(hidden)} if hidden else {}
    with torch.random.fork_rng([], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return NETWORKS[name](num_classes, width, bias=bias, **options)


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _convolution(fan_in: int, fan_out: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(fan_in, fan_out, size, stride, padding=size // 2, bias=False)


def _shortcut(fan_in: int, fan_out: int, stride: int) -> nn.Module:
    if stride == 1 and fan_in == fan_out:
        return nn.Identity()
    return nn.Sequential(_convolution(fan_in, fan_out, 1, stride), nn.BatchNorm2d(fan_out))

"""Networks for small images: the parameter counts of the literature, and of a count by hand."""

import pytest
import torch

from wellposed.pair import reinitialized
from wellposed.studies.networks import NETWORKS, build_network

# Known figures for ten classes, as the literature on CIFAR and its public implementations count them.
KNOWN = {
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "preact_resnet18": 11_171_146,
    "vgg16_bn": 14_728_266,
    "vgg19_bn": 20_040_522,
}
DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "preact_resnet18": (2, 2, 2, 2),
    "vgg16_bn": (2, 2, 3, 3, 3),
    "vgg19_bn": (2, 2, 4, 4, 4),
}


def count(network):
    return sum(p.numel() for p in network.parameters())


def norm(channels):
    return 2 * channels


def counted_by_hand(name, classes, base):
    """Closed-form number of parameters: base channels in the first stage."""
    depths = DEPTHS[name]
    if name.startswith("vgg"):
        total, fan_in = 0, 3
        for width, depth in zip((base, 2 * base, 4 * base, 8 * base, 8 * base), depths, strict=True):
            for _ in range(depth):
                total += 9 * fan_in * width + width + norm(width)  # VGG's convolutions have a bias
                fan_in = width
        return total + fan_in * classes + classes
    first = name.startswith("preact")
    total, fan_in = 27 * base + (0 if first else norm(base)), base
    for stage, depth in enumerate(depths):
        width = base * 2**stage
        for position in range(depth):
            if name == "resnet50":
                out = 4 * width
                total += fan_in * width + norm(width) + 9 * width**2 + norm(width) + width * out + norm(out)
            else:
                out = width
                total += 9 * fan_in * width + 9 * width**2 + norm(width) + norm(fan_in if first else width)
            if fan_in != out or (stage > 0 and position == 0):
                total += fan_in * out + (0 if first else norm(out))
            fan_in = out
    return total + fan_in * classes + classes


@pytest.mark.parametrize("name", list(NETWORKS))
def test_parameters_number_as_known_and_as_counted_by_hand(name):
    with torch.device("meta"):
        assert count(build_network(name, 10)) == KNOWN[name] == counted_by_hand(name, 10, 64)
        assert count(build_network(name, 100)) == counted_by_hand(name, 100, 64)
        assert count(build_network(name, 7, width=1 / 16)) == counted_by_hand(name, 7, 4)
        assert count(build_network(name, 10, bias=False)) == KNOWN[name] - 10


@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_parameter_of_a_network_learns_and_the_shape_is_right(name):
    network = build_network(name, 5, width=1 / 32, seed=0)
    logits = network(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (3, 5) and bool(logits.isfinite().all())
    logits.square().sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    assert silent == []
    assert float(network.head.weight.grad.abs().sum()) > 0


def test_the_resolution_halves_in_all_stages_but_the_first():
    network = build_network("resnet18", 10, width=1 / 16, seed=0)
    sides, x = [], network.stem(torch.zeros(2, 3, 32, 32))
    for stage in network.stages:
        x = stage(x)
        sides.append((x.shape[1], x.shape[2]))
    assert sides == [(4, 32), (8, 16), (16, 8), (32, 4)]


def test_a_preactivation_block_without_convolutions_is_the_identity():
    block = build_network("preact_resnet18", 10, width=1 / 16, seed=0).stages[0][1]
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), x)


def test_the_seed_decides_the_initialisation_and_the_global_state_is_given_back():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (build_network("resnet18", 10, width=1 / 32, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_a_second_network_can_be_drawn_from_the_first_one():
    first = build_network("vgg16_bn", 10, width=1 / 32, hidden=(64, 64), seed=0)
    second = reinitialized(first, torch.Generator().manual_seed(1))
    assert count(first) == count(second)
    assert not torch.equal(first.head.weight, second.head.weight)


def test_hidden_layers_of_vgg_follow_the_features_with_dropout():
    with torch.device("meta"):
        network = build_network("vgg19_bn", 10, hidden=(4096, 4096))
    extra = 512 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 10 + 10 - (512 * 10 + 10)
    assert count(network) == KNOWN["vgg19_bn"] + extra
    assert sum(isinstance(m, torch.nn.Dropout) for m in network.modules()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet81", 10), r"name must be one of .*, got 'resnet81'; did you mean 'resnet18'\?"),
        (("resnet18", 0), "num_classes must be >= 1 and width > 0, got num_classes=0"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_network(*arguments)


def test_width_and_hidden_are_checked():
    with pytest.raises(ValueError, match=r"width=0\.0"):
        build_network("resnet18", 10, width=0.0)
    with pytest.raises(ValueError, match="hidden belongs to VGG, got hidden=\\(8,\\) for 'resnet18'"):
        build_network("resnet18", 10, hidden=(8,))

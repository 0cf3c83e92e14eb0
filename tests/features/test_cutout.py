"""Cutout: how many holes, how large, where; whole numbers from continuous hyperparameters."""

import pytest
import torch
from torch import nn

from wellposed import Hyperparameter, Step
from wellposed.features import Cutout, cut_holes
from wellposed.hyperparameter import substituted


def cut(method, images, seed=0):
    step = Step(nn.Identity(), inputs=images, generator=torch.Generator().manual_seed(seed))
    method.on_batch(step)
    return step.inputs


def test_one_hole_is_a_square_of_its_length_cut_off_at_the_border():
    images = cut_holes(torch.ones(500, 2, 12, 12), torch.ones(500).long(), torch.full((500,), 4))
    hidden = images == 0
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    rows, columns = hidden[:, 0].any(2).sum(1), hidden[:, 0].any(1).sum(1)
    assert torch.equal(hidden[:, 0].sum((1, 2)), rows * columns)
    assert int(rows.max()) == 4 and int(rows.min()) == 2 and int(columns.max()) == 4


def test_centres_are_uniform_over_the_image():
    images = cut_holes(torch.ones(20_000, 1, 5, 5), torch.ones(20_000).long(), torch.ones(20_000).long())
    share = (images == 0).float().mean(0)[0]
    torch.testing.assert_close(share, torch.full((5, 5), 1 / 25), rtol=0, atol=0.01)


def test_each_image_has_its_own_number_and_length():
    holes, length = torch.tensor([0, 1, 3, 2]), torch.tensor([3, 0, 1, 2])
    counts = [int((cut_holes(torch.ones(4, 1, 40, 40), holes, length)[i] == 0).sum()) for i in range(4)]
    assert counts[:2] == [0, 0] and 1 <= counts[2] <= 3 and 2 <= counts[3] <= 8


def test_draws_come_from_the_generator_and_other_pixels_stay():
    images = torch.randn(3, 3, 16, 16) + 10
    found = cut(Cutout(2, 5), images)
    assert torch.equal(found, cut(Cutout(2, 5), images)) and not torch.equal(found, cut(Cutout(2, 5), images, seed=1))
    assert torch.equal(found[found != 0], images[found != 0]) and bool((images != 0).all())


def test_training_sees_the_floor_of_each_examples_value_within_the_range():
    holes = Hyperparameter(2.5, 0.0, 4.0, discrete=True, per_example=True)
    raw = torch.linspace(-15, 15, 201)
    with substituted({holes: raw}):
        values = holes()
        assert set(values.tolist()) == {0.0, 1.0, 2.0, 3.0}
        images = cut(Cutout(holes, 1), torch.ones(201, 1, 64, 64))
    hidden = (images == 0).flatten(1).sum(1)
    assert bool((hidden <= values).all()) and bool((hidden[values > 0] > 0).all()) and not hidden[values == 0].any()


def test_a_count_has_no_gradient():
    holes = Hyperparameter(2.5, 0.0, 4.0, discrete=True)
    raw = holes.raw.clone().requires_grad_()
    with substituted({holes: raw}):
        assert not cut(Cutout(holes, 3), torch.ones(2, 1, 8, 8)).requires_grad


def test_what_is_wrong_is_refused():
    with pytest.raises(ValueError, match="Cutout: holes must be >= 0, got -1"):
        Cutout(-1)
    with pytest.raises(TypeError, match="Cutout: length must be an integer or a Hyperparameter, got 2.5"):
        Cutout(1, 2.5)
    with pytest.raises(ValueError, match="give its Hyperparameter discrete=True"):
        Cutout(Hyperparameter(1.0, 0.0, 4.0))
    with pytest.raises(ValueError, match=r"inputs must be images \(batch, channels, height, width\), got \(2, 3\)"):
        cut(Cutout(1, 2), torch.zeros(2, 3))

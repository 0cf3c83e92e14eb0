"""Batches without end."""

from itertools import chain

import pytest
import torch

from wellposed import TensorLoader
from wellposed.loading import EndlessBatches


def loader():
    return TensorLoader(torch.arange(10.0), torch.arange(10), batch_size=4, shuffle=True, seed=3)


def rows(batches, n):
    return [next(batches).index.tolist() for _ in range(n)]


def test_epochs_follow_each_other_in_new_orders():
    found = rows(EndlessBatches(loader(), "train"), 6)
    assert sorted(chain(*found[:3])) == sorted(chain(*found[3:])) == list(range(10))
    assert found[:3] != found[3:]


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 7])
def test_a_restored_position_continues_with_the_same_batches(taken):
    whole = rows(EndlessBatches(loader(), "train"), 9)
    restored = EndlessBatches(loader(), "train")
    restored.restore(taken)
    assert restored.taken == taken
    assert rows(restored, 9 - taken) == whole[taken:]


def test_an_empty_loader_is_named():
    with pytest.raises(ValueError, match="the validation loader yielded no batch"):
        next(EndlessBatches([], "validation"))


def test_a_loader_that_runs_dry_is_named():
    batches = EndlessBatches(iter([1]), "train")
    assert next(batches) == 1
    with pytest.raises(ValueError, match="the train loader yielded no batch"):
        next(batches)

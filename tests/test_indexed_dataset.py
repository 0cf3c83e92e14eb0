"""IndexedDataset and TensorLoader: every batch says which examples it holds, in an order that can be repeated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from wellposed.indexed_dataset import IndexedDataset, TensorLoader


class Squares(Dataset):
    """A plain data set of (x, x ** 2), in the form that `as_form` gives."""

    def __init__(self, as_form):
        self.as_form = as_form

    def __len__(self):
        return 6

    def __getitem__(self, position):
        return self.as_form(float(position), float(position) ** 2)


@pytest.mark.parametrize(
    "as_form, expected",
    [
        (lambda x, y: (x, y), (3.0, 9.0, 3)),
        (lambda x, y: [x, y], (3.0, 9.0, 3)),
        (lambda x, y: {"x": x, "y": y}, {"x": 3.0, "y": 9.0, "index": 3}),
    ],
)
def test_adds_the_position_to_pairs_and_dicts(as_form, expected):
    dataset = IndexedDataset(Squares(as_form))
    assert len(dataset) == 6
    assert dataset[3] == expected
    assert dataset.__getitems__([3, 0])[0] == expected


def test_index_survives_shuffling_and_subsets():
    targets = torch.arange(20) * 10
    part = Subset(IndexedDataset(TensorDataset(torch.zeros(20, 2), targets)), range(5, 20))
    loader = DataLoader(part, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    seen = []
    for _, y, index in loader:
        assert torch.equal(y, index * 10)
        seen += index.tolist()
    assert sorted(seen) == list(range(5, 20))


def test_fetches_a_whole_batch_at_once_where_the_data_set_can():
    calls = []

    class Batched(Squares):
        def __getitems__(self, positions):
            calls.append(list(positions))
            return [self[p] for p in positions]

    loader = DataLoader(IndexedDataset(Batched(lambda x, y: (x, y))), batch_size=3)
    assert [index.tolist() for _, _, index in loader] == [[0, 1, 2], [3, 4, 5]] == calls


def test_refuses_what_has_no_position_and_samples_it_cannot_read():
    with pytest.raises(TypeError, match="IndexedDataset: dataset must have a length and items, got generator"):
        IndexedDataset(x for x in range(3))
    with pytest.raises(TypeError, match=r"a sample must be \(inputs, targets\) or a dict, got tuple of length 3"):
        IndexedDataset(Squares(lambda x, y: (x, y, y)))[0]


@given(count=st.integers(1, 30), size=st.integers(1, 12), shuffle=st.booleans(), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_an_epoch_is_a_permutation_of_the_data(count, size, shuffle, seed):
    inputs = torch.arange(count) * 2.0
    loader = TensorLoader(inputs, -torch.arange(count), batch_size=size, shuffle=shuffle, seed=seed)
    batches = list(loader)
    assert len(batches) == len(loader) and all(len(b.index) == size for b in batches[:-1])
    for batch in batches:
        assert torch.equal(batch.inputs, batch.index * 2.0) and torch.equal(batch.targets, -batch.index)
    order = torch.cat([b.index for b in batches])
    assert sorted(order.tolist()) == list(range(count))
    assert shuffle or order.tolist() == list(range(count))
    if size > count:
        with pytest.raises(ValueError, match=f"batch_size {size} with drop_last leaves none of {count} examples"):
            TensorLoader(inputs, inputs, batch_size=size, drop_last=True)
        return
    short = TensorLoader(inputs, inputs, batch_size=size, drop_last=True)
    assert len(short) == len(list(short)) == count // size


def test_passes_differ_without_being_told_and_positions_may_be_those_of_a_larger_set():
    data = torch.arange(50)
    loader = TensorLoader(data, data, batch_size=50, shuffle=True, index=data + 100)
    first, second = next(iter(loader)), next(iter(loader))
    assert not torch.equal(first.index, second.index)
    assert torch.equal(first.index, first.inputs + 100)


def order_of(loader: TensorLoader, epoch: int) -> torch.Tensor:
    loader.set_epoch(epoch)
    return torch.cat([batch.index for batch in loader])


def test_order_is_a_pure_function_of_seed_and_epoch():
    data = torch.arange(100)
    loader = TensorLoader(data, data, batch_size=7, shuffle=True, seed=3)
    orders = [order_of(loader, epoch) for epoch in range(3)]
    torch.rand(1)  # the global generator plays no part
    twin = TensorLoader(data, data, batch_size=100, shuffle=True, seed=3)
    assert torch.equal(order_of(twin, 2), orders[2]) and torch.equal(order_of(loader, 0), orders[0])
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    # neighbouring seeds share no epoch, as they would with seed + epoch
    other = TensorLoader(data, data, batch_size=7, shuffle=True, seed=4)
    assert not torch.equal(order_of(other, 0), orders[1])


def test_transform_sees_whole_batches_and_repeats_itself():
    def add_noise(inputs, generator):
        return inputs + torch.randn(inputs.shape, generator=generator)

    data = torch.zeros(10, 2)
    loader = TensorLoader(data, data, batch_size=4, shuffle=True, seed=1, transform=add_noise)

    def noisy(epoch):
        loader.set_epoch(epoch)
        return [batch.inputs for batch in loader]

    first, second = noisy(0), noisy(1)
    for a, b, again in zip(first, second, noisy(0), strict=True):
        assert torch.equal(a, again) and not torch.equal(a, b)
    assert not torch.equal(first[0], first[1])
    assert not data.any()


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_copies(shuffle):
    data = torch.ones(4, 2)
    for batch in TensorLoader(data, data, batch_size=2, shuffle=shuffle):
        batch.inputs.zero_()  # as an in-place layer would
    assert bool(data.all())


def test_containers_and_weights_are_cut_alike():
    inputs = {"ids": torch.arange(6), "mask": torch.arange(6) % 2}
    weights = torch.arange(6.0) / 10
    for batch in TensorLoader(inputs, torch.arange(6.0), batch_size=4, shuffle=True, weights=weights):
        assert torch.equal(batch.inputs["ids"], batch.index)
        assert torch.equal(batch.inputs["mask"], batch.index % 2)
        assert torch.equal(batch.weights, weights[batch.index])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"inputs": torch.zeros(4, 2)}, "must hold 5 examples like targets, got 4"),
        ({"weights": torch.ones(3)}, "must hold 5 examples like targets, got 3"),
        ({"inputs": torch.zeros(0, 2), "targets": torch.zeros(0)}, "targets is empty"),
    ],
)
def test_bad_arguments_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        TensorLoader(**{"inputs": torch.zeros(5, 2), "targets": torch.zeros(5), "batch_size": 2, **arguments})

"""IndexedDataset and TensorLoader: every batch says which examples it holds, in an order that can be repeated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

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
        (lambda x, y: x, (3.0, 3)),
    ],
)
def test_appends_the_position_to_any_form_of_sample(as_form, expected):
    dataset = IndexedDataset(Squares(as_form))
    assert len(dataset) == 6
    assert dataset[3] == dataset[-3] == expected
    assert dataset.__getitems__([3, 0])[0] == expected


def test_index_survives_shuffling_workers_and_subsets():
    targets = torch.arange(20) * 10
    dataset = IndexedDataset(TensorDataset(torch.zeros(20, 2), targets))
    part = Subset(dataset, range(5, 20))
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


def test_refuses_what_has_no_position_and_what_has_an_index():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(TypeError, match="IndexedDataset: dataset must have positions .* got Stream"):
        IndexedDataset(Stream())
    with pytest.raises(ValueError, match="already have the key 'index'"):
        IndexedDataset(Squares(lambda x, y: {"index": x}))[0]


def everything(loader):
    return [(x.clone(), y.clone(), i.clone()) for x, y, i in loader]


@given(count=st.integers(1, 30), size=st.integers(1, 12), shuffle=st.booleans(), seed=st.integers(-(2**63), 2**63 - 1))
@settings(deadline=None, max_examples=60)
def test_an_epoch_is_a_permutation_of_the_data(count, size, shuffle, seed):
    inputs = torch.arange(count) * 2.0
    loader = TensorLoader(inputs, -torch.arange(count), batch_size=size, shuffle=shuffle, seed=seed)
    batches = everything(loader)
    assert len(batches) == len(loader) and all(len(i) == size for _, _, i in batches[:-1])
    for x, y, index in batches:
        assert torch.equal(x, index * 2.0) and torch.equal(y, -index)
    order = torch.cat([i for _, _, i in batches])
    assert sorted(order.tolist()) == list(range(count))
    assert shuffle or order.tolist() == list(range(count))
    if size <= count:
        short = TensorLoader(inputs, inputs, batch_size=size, drop_last=True)
        assert len(short) == len(everything(short)) == count // size


def test_order_is_a_pure_function_of_seed_and_epoch():
    data = torch.arange(100)
    loader = TensorLoader(data, data, batch_size=7, shuffle=True, seed=3)
    passes = []
    for _ in range(3):  # each pass moves on to the next epoch
        torch.rand(1)  # the global generator plays no part
        passes.append(torch.cat([i for _, _, i in loader]))
    assert not torch.equal(passes[0], passes[1]) and not torch.equal(passes[1], passes[2])
    twin = TensorLoader(data, data, batch_size=100, shuffle=True, seed=3)
    twin.set_epoch(2)
    assert torch.equal(next(iter(twin))[2], passes[2]) and torch.equal(twin.order(1), passes[1])
    # neighbouring seeds share no epoch, as seed + epoch would
    assert not torch.equal(TensorLoader(data, data, batch_size=9, shuffle=True, seed=4).order(0), passes[1])


def test_transform_sees_whole_batches_and_repeats_itself():
    def add_noise(inputs, generator):
        return inputs + torch.randn(inputs.shape, generator=generator)

    data = torch.zeros(10, 2)
    loader = TensorLoader(data, data, batch_size=4, shuffle=True, seed=1, transform=add_noise)
    first, second = everything(loader), everything(loader)
    loader.set_epoch(0)
    for (a, _, _), (b, _, _), (again, _, _) in zip(first, second, everything(loader), strict=True):
        assert torch.equal(a, again) and not torch.equal(a, b)
    assert not torch.equal(first[0][0], first[1][0])
    assert not data.any()


def test_batches_are_copies():
    data = torch.ones(4, 2)
    for inputs, _, _ in TensorLoader(data, data, batch_size=2):
        inputs.zero_()
    assert bool(data.all())


def test_containers_weights_and_positions_of_a_part():
    inputs = {"ids": torch.arange(6), "mask": torch.arange(6) % 2}
    targets = (torch.arange(6.0), torch.arange(6.0) * 2)
    index, weights = torch.arange(6) * 5, torch.arange(6.0) / 10
    loader = TensorLoader(inputs, targets, batch_size=4, shuffle=True, index=index, weights=weights)
    for batch in loader:
        position = batch["index"] // 5
        assert torch.equal(batch["inputs"]["ids"], position)
        assert torch.equal(batch["inputs"]["mask"], position % 2)
        assert torch.equal(batch["targets"][1], position * 2.0)
        assert torch.equal(batch["weights"], weights[position])
    x, y, i = loader.dataset[2]
    assert (int(x["ids"]), float(y[1]), int(i), len(loader.dataset)) == (2, 4.0, 10, 6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"batch_size": 9, "drop_last": True}, r"batch_size must be <= the number of examples \(5\)"),
        ({"targets": torch.zeros(4)}, "targets must hold 5 examples like inputs, got 4"),
        ({"index": torch.arange(6)}, "index must hold 5 examples like inputs, got 6"),
        ({"weights": torch.ones(3)}, "weights must hold 5 examples like inputs, got 3"),
        ({"inputs": torch.zeros(0, 2)}, "inputs must hold at least one example"),
        ({"inputs": [1.0, 2.0]}, "inputs must be a tensor with a batch dimension.* got float"),
    ],
)
def test_bad_arguments_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        TensorLoader(**{"inputs": torch.zeros(5, 2), "targets": torch.zeros(5), "batch_size": 2, **arguments})


def test_negative_epoch_is_refused():
    with pytest.raises(ValueError, match="epoch must be >= 0, got -1"):
        TensorLoader(torch.zeros(2), torch.zeros(2), batch_size=1).set_epoch(-1)

"""Sources from hidden states: clusters are k-means', the schedule is kept, selection by discovered sources."""

import copy
from functools import partial

import pytest
import torch
from sklearn.cluster import KMeans
from torch import nn

from wellposed import Step, fit
from wellposed.batching import Batch
from wellposed.gradients.mini_batch_coreset import MiniBatchCoreset
from wellposed.gradients.source_discovery import SourceDiscovery, cluster, nearest_centre, spread_seeds


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def clouds(n=300, k=4, d=6, seed=0):
    """Well separated clouds of unequal sizes, and their numbers."""
    g = generator(seed)
    centres = 10 * torch.randn(k, d, generator=g)
    odds = torch.tensor([1.0, 1.0, *[7.0] * (k - 2)])
    ids = torch.multinomial(odds, n, replacement=True, generator=g)
    return centres[ids] + 0.3 * torch.randn(n, d, generator=g), ids


def same_partition(a, b):
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    return len(pairs) == len(set(a.tolist())) == len(set(b.tolist()))


def test_separated_clouds_are_found():
    points, ids = clouds()
    for seed in range(5):
        centres = cluster(points, 4, generator(seed))
        assert same_partition(nearest_centre(points, centres), ids)


def test_the_spread_within_clusters_is_that_of_scikit_learn():
    points = torch.randn(200, 3, generator=generator(1))
    ours = min(
        float((points - c[nearest_centre(points, c)]).square().sum())
        for c in (cluster(points, 5, generator(s), 100) for s in range(10))
    )
    theirs = KMeans(5, n_init=10, random_state=0).fit(points.numpy()).inertia_
    assert ours == pytest.approx(theirs, rel=0.02)


def test_seeds_are_points_and_far_ones_are_likelier():
    points = torch.cat([torch.zeros(50, 1), torch.full((1, 1), 100.0)])
    found = [spread_seeds(points, 2, generator(seed)) for seed in range(20)]
    assert all(sorted(seeds.flatten().tolist()) == [0.0, 100.0] for seeds in found)
    same = spread_seeds(torch.ones(5, 2), 3, generator())
    assert same.shape == (3, 2)
    assert torch.isfinite(cluster(torch.ones(5, 2), 3, generator())).all()
    with pytest.raises(ValueError, match="k must be at most the number of points, 3, got 4"):
        cluster(torch.ones(3, 2), 4, generator())


def test_clusters_are_drawn_after_the_warm_up_and_at_equal_distances():
    discovery = SourceDiscovery(num_sources=4, warmup=5, reclusters=3, bank=64)
    points, _ = clouds(16 * 45)
    drawn = []
    for number in range(45):
        before = discovery.clustered
        assert (discovery.assign(points[:4]) is None) == (number < 5)
        discovery.observe(points[16 * number : 16 * (number + 1)], total=45)
        if discovery.clustered > before:
            drawn.append(number + 1)
    assert drawn == [5, 15, 25, 35]
    assert discovery.bank.shape == (64, 6) and sum(discovery.sizes.values()) == 64


def test_hidden_states_are_means_over_own_tokens():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.head(self.body(x).tanh())

    torch.manual_seed(0)
    model, x = Model(), torch.randn(6, 4, 3)
    targets = torch.zeros(6, 4, dtype=torch.int64)
    targets[2, 1:] = -100
    step = Step(model, inputs=x, targets=targets)
    states = model.body(x).tanh().detach()
    expected = states.mean(1)
    expected[2] = states[2, 0]
    for chunk in (None, 4):
        torch.testing.assert_close(SourceDiscovery(num_sources=2).hidden_states(step, chunk), expected)
    found = SourceDiscovery(num_sources=2, module="body").hidden_states(step)
    torch.testing.assert_close(found[0], x[0].mean(0))
    with pytest.raises(ValueError, match="no module 'tail'"):
        SourceDiscovery(num_sources=2, module="tail").hidden_states(step)
    flat = Step(nn.Linear(3, 2), inputs=x[:, 0], targets=targets[:, 0])
    torch.testing.assert_close(SourceDiscovery(num_sources=2).hidden_states(flat), x[:, 0])


class Pools:
    """Pools of 32 from clouds whose labels depend on the cloud."""

    def __init__(self, steps=12):
        self.points, self.ids = clouds(32 * steps)
        self.steps = steps

    def __len__(self):
        return self.steps

    def __iter__(self):
        for rows in torch.arange(32 * self.steps).split(32):
            yield Batch(self.points[rows], self.ids[rows] % 3, rows)


def trained(path=None, epochs=1, ranking="facility", record=None, discovery=None):
    torch.manual_seed(0)
    coreset = MiniBatchCoreset(
        sources=discovery or SourceDiscovery(num_sources=4, warmup=3, reclusters=2, bank=256, module="0"),
        ranking=ranking,
    )
    if record is not None:
        choose = coreset.on_batch

        def on_batch(step):
            pool = step.index
            choose(step)
            record.append((pool, step.index, coreset.small))

        coreset.on_batch = on_batch
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    return coreset, fit(model, Pools(), epochs=epochs, regularizer=coreset, optimizer=optimizer, checkpoint=path).model


@pytest.mark.parametrize("ranking", ["facility", "random"])
def test_the_rare_clouds_are_kept_once_they_are_discovered(ranking):
    record = []
    coreset, _ = trained(ranking=ranking, record=record)
    ids = Pools().ids
    rare = torch.tensor([q for q in range(4) if 4 * int((ids == q).sum()) < len(ids)])
    assert rare.tolist() == [0, 1] and coreset.discovery.clustered == 3
    for number, (pool, chosen, _) in enumerate(record):
        assert len(chosen) == 16
        kept, there = (torch.isin(ids[rows], rare).sum() for rows in (chosen, pool))
        if number >= 3:
            assert int(kept) == min(16, int(there))
    early = [
        torch.isin(ids[chosen], rare).double().mean() / torch.isin(ids[pool], rare).double().mean()
        for pool, chosen, _ in record[:3]
    ]
    assert sum(early) / 3 < 1.4  # at random before: no source is favoured twofold


def test_a_resumed_run_picks_what_the_uninterrupted_one_picks(tmp_path):
    whole = []
    trained(epochs=2, record=whole)
    first = []
    coreset, _ = trained(tmp_path / "run.pt", record=first)
    state = copy.deepcopy(coreset.state_dict())
    other = MiniBatchCoreset(sources=SourceDiscovery(num_sources=4, warmup=3, reclusters=2, bank=256, module="0"))
    other.load_state_dict(state)
    for name in ("bank", "centres"):
        assert torch.equal(getattr(other.discovery, name), getattr(coreset.discovery, name))
    assert other.discovery.sizes == coreset.discovery.sizes and other.updates == coreset.updates == 12
    # The plans differ in their totals (12 and 24 steps), so compare only what comes before the first re-clustering.
    for a, b in zip(whole[:6], first[:6], strict=True):
        assert torch.equal(a[1], b[1])


def test_bad_arguments_are_named():
    for name, value in (("num_sources", 1), ("warmup", 0), ("reclusters", -1), ("bank", 3)):
        with pytest.raises(ValueError, match=f"SourceDiscovery: {name} must be an integer >= "):
            SourceDiscovery(**{"num_sources": 4, name: value})
    with pytest.raises(ValueError, match="no linear layer"):
        SourceDiscovery().hidden_states(Step(nn.ReLU(), inputs=torch.zeros(2, 3), targets=torch.zeros(2)))
    with pytest.raises(ValueError, match="clusters have no names that are known before"):
        MiniBatchCoreset(sources="discover", small_sources=[1])

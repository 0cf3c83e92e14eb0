"""BA-LoRA under data parallelism: terms that couple a batch see the shares of all ranks; two are as one process."""

import pytest
import torch
from two_processes import two_processes_and_one

SCRIPT = """
    import warnings
    from functools import partial
    from torch import nn
    from wellposed import Compose, fit
    from wellposed.losses.adapter_teacher import FrozenCopyTeacher
    from wellposed.losses.bias_alleviating import BiasAlleviatingLoRA
    from wellposed.losses.logit_diversity import logit_covariance
    from wellposed.losses.logit_spectrum import spectral_concentration
    from wellposed.losses.logit_terms import LogitConsistency, LogitDiversity
    from wellposed.losses.shared_rows import Rows, SharedRows
    from wellposed.losses.spectral_term import SpectralConcentration
    from wellposed.weights.low_rank import LowRankAdaptation

    warnings.simplefilter("ignore")
    normal = lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
    X, Y = normal(32, 6), torch.arange(32) % 8
    g = torch.Generator().manual_seed(0)
    IDS, NEXT = torch.randint(0, 30, (32, 6), generator=g), torch.randint(0, 30, (32, 6), generator=g)
    # Rank 0 has the short sequences, and the second batch gives it no valid token at all.
    LENGTHS = torch.randint(4, 7, (32,), generator=g)
    LENGTHS[torch.arange(32) % 8 < 5] = 3
    LABELS = NEXT.masked_fill(torch.arange(6) >= LENGTHS[:, None], -100)
    LABELS[8:13] = -100

    class Share:
        "Batches of 8, of which each rank takes its part."
        def __init__(self, first, tokens=False):
            self.first, self.tokens = first, tokens
        def __len__(self):
            return 4
        def __iter__(self):
            for rows in torch.arange(32).split(8):
                rows = rows if world == 1 else (rows[:self.first] if rank == 0 else rows[self.first:])
                if self.tokens:
                    longest = int(LENGTHS[rows].max())
                    yield IDS[rows, :longest], LABELS[rows, :longest]
                else:
                    yield X[rows], Y[rows]

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.body, self.head = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 30)
            self.embedding.requires_grad_(False), self.head.requires_grad_(False)
        def forward(self, ids):
            return self.head(self.body(self.embedding(ids)).tanh())

    def tuned(method, first=5, tokens=False, adapter=True, accumulation=1):
        torch.manual_seed(0)
        model = Tokens() if tokens else nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8))
        method = Compose(LowRankAdaptation(2, init="pissa"), method) if adapter else method
        model = fit(model.double(), Share(first, tokens), epochs=2, regularizer=method, accumulation=accumulation,
                    optimizer=partial(torch.optim.SGD, lr=0.3)).model
        return model.state_dict()

    strong = {"consistency": 0.5, "diversity": 0.5, "concentration": 0.5, "schedules": "constant"}
    result = {
        "classification": tuned(BiasAlleviatingLoRA("classification", **strong)),
        "one example on a rank": tuned(BiasAlleviatingLoRA("classification", **strong, k=2), first=7),
        "generation": tuned(BiasAlleviatingLoRA("generation", **strong, k=3), tokens=True),
        "v5 generation": tuned(BiasAlleviatingLoRA("generation", "v5", **strong, k=2), tokens=True),
        "basis of the head": tuned(SpectralConcentration(0.5, k=2, head="head"), tokens=True, adapter=False),
        "randomized": tuned(SpectralConcentration(0.5, k=2, norm="frobenius", method="randomized"), tokens=True,
                            adapter=False),
        "adaptive": tuned(LogitConsistency(5.0, adaptive=True, temperature=0.3, teacher=FrozenCopyTeacher()), tokens=True,
                          adapter=False),
        "centred covariance": tuned(LogitDiversity(0.5, center_rows=True), adapter=False),
    }

    # Second derivatives, of an average over ranks as DistributedDataParallel takes it.
    rows = X if world == 1 else (X[:20] if rank == 0 else X[20:])
    for name, term in (("covariance", lambda z, where: logit_covariance(where.join(z))),
                       ("spectrum", lambda z, where: spectral_concentration(z, 2, where=where))):
        weight = normal(6, 5, seed=1).requires_grad_()
        z = rows @ weight
        where = SharedRows("x", z, 1) if world > 1 else Rows()
        mean = lambda value: where.total(value) / world
        (first,) = torch.autograd.grad(term(z, where), weight, create_graph=True)
        (second,) = torch.autograd.grad((mean(first) * normal(6, 5, seed=2)).sum(), weight)
        result[f"second derivative of the {name}"] = {"gradient": mean(first).detach(), "product": mean(second)}

    if world > 1:
        # The first rank makes two micro-batches of its seven examples, the second one of its one.
        try:
            tuned(LogitDiversity(0.5), first=7, accumulation=2, adapter=False)
        except ValueError as error:
            result["message"] = str(error)
"""
CASES = [
    "classification", "one example on a rank", "generation", "v5 generation", "basis of the head", "randomized",
    "adaptive", "centred covariance", "second derivative of the covariance", "second derivative of the spectrum",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return two_processes_and_one(tmp_path_factory.mktemp("ranks"), SCRIPT)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_as_one_process(results, case):
    first, second, single = (result[case] for result in results)
    assert single.keys() == first.keys()
    for name, value in single.items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-12)
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-9)


def test_ranks_with_different_numbers_of_micro_batches_are_told(results):
    for result in results[:2]:
        assert "LogitDiversity: its term couples" in result["message"]
        assert "cut their shares into [2, 1] micro-batches" in result["message"]

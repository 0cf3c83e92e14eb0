"""On two ranks the pool is one: the same examples are chosen, dealt out evenly source by source, and trained on."""

import pytest
import torch
from two_processes import two_processes_and_one

SCRIPT = """
    from functools import partial
    from torch import nn
    from wellposed import Compose, fit
    from wellposed.batching import Batch
    from wellposed.regularizer import Regularizer
    from wellposed.gradients.mini_batch_coreset import MiniBatchCoreset
    from wellposed.gradients.source_discovery import SourceDiscovery
    from wellposed.objective import cross_entropy

    kind = arguments[0]
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (128, 6), generator=g)
    lengths = torch.randint(2, 7, (128,), generator=g)
    # The first ten of every pool of 32, which are rank 0's, are short: ranks pad to different lengths.
    lengths[torch.arange(128) % 32 < 10] = 3
    targets = ids.roll(-1, 1).masked_fill(torch.arange(6) >= lengths[:, None], -100)
    source = torch.multinomial(torch.tensor([5.0, 5.0, 1.0]), 128, replacement=True, generator=g)

    class Pools:
        "Pools of 32, of which each rank has unequal parts."
        def __len__(self):
            return 4
        def __iter__(self):
            for rows in torch.arange(128).split(32):
                rows = rows if world == 1 else (rows[:10] if rank == 0 else rows[10:])
                longest = int(lengths[rows].max())
                mask = (torch.arange(longest) < lengths[rows, None]).long()
                inputs = {"input_ids": ids[rows, :longest] * mask, "mask": mask}
                yield Batch(inputs, targets[rows, :longest], rows, None, {"source": source[rows]})

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)
        def forward(self, input_ids, mask):
            return self.head(self.body((self.embed(input_ids) * mask[..., None]).cumsum(1)).tanh())

    class Record(Regularizer):
        def __init__(self):
            super().__init__()
            self.seen = []
        def on_batch(self, step):
            self.seen.append((step.index, step.weights))

    torch.manual_seed(0)
    options = {
        "exact": {"parameter": "body.weight"},
        "zo": {"feature": "zo", "n_directions": 2, "weights": "cluster"},
        "random": {"ranking": "random", "weights": "unbiased"},
        "discover": {"sources": SourceDiscovery(num_sources=3, warmup=1, reclusters=1, module="head"), "history": "selected"},
    }[kind]
    method, record = MiniBatchCoreset(topk=7, **options), Record()
    # In double precision: rounding would break ties of the chosen gains differently.
    model = fit(Model().double(), Pools(), epochs=1, regularizer=Compose(method, record), accumulation=2,
                optimizer=partial(torch.optim.AdamW, lr=1e-2)).model
    result = (record.seen, source, model.state_dict(), method.get_extra_state())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exact", "zo", "random", "discover"])
def test_two_ranks_choose_and_train_as_one_process_does(tmp_path, kind):
    first, second, single = two_processes_and_one(tmp_path, SCRIPT, kind)
    source = single[1]
    for (a, wa), (b, wb), (one, w) in zip(first[0], second[0], single[0], strict=True):
        assert len(one) == 16 and len(a) == len(b) == 8
        both = torch.cat([a, b])
        assert both.sort().values.tolist() == one.tolist()
        if kind != "discover":
            counts = [torch.bincount(source[part], minlength=3) for part in (a, b)]
            assert int((counts[0] - counts[1]).abs().max()) <= 1
        assert (w is None) == (wa is None) == (wb is None)
        if w is not None:
            torch.testing.assert_close(torch.cat([wa, wb])[both.argsort()], w)
    for name, value in single[2].items():
        assert torch.equal(first[2][name], second[2][name]), name
        torch.testing.assert_close(first[2][name], value, rtol=0, atol=1e-9)
    states = [part[3] for part in (first, second, single)]
    assert states[0]["counts"] == states[1]["counts"] == states[2]["counts"]
    assert states[0]["updates"] == states[2]["updates"] == 4
    if states[2]["moments"] is not None:
        assert torch.equal(states[0]["moments"]["m"], states[1]["moments"]["m"])
        torch.testing.assert_close(states[0]["moments"]["m"], states[2]["moments"]["m"], rtol=0, atol=1e-9)

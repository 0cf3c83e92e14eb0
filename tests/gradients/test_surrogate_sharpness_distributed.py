"""Under data parallelism all ranks measure one norm, probe one point and keep one multiplier: that of one process."""

import pytest
import torch
from two_processes import two_processes_and_one

SCRIPT = """
    from functools import partial
    from torch import nn
    from wellposed import fit, squared_error
    from wellposed.gradients import SurrogateSharpness
    from wellposed.indexed_dataset import TensorLoader

    hvp = arguments[0]
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))

    class Share:
        "Batches of 16, of which each rank takes unequal parts."
        def __init__(self):
            self.whole = TensorLoader(x, x.sin().sum(1), batch_size=16, shuffle=True)
        def __len__(self):
            return len(self.whole)
        def set_epoch(self, epoch):
            self.whole.set_epoch(epoch)
        def __iter__(self):
            for b in self.whole:
                part = slice(None) if world == 1 else (slice(0, 10) if rank == 0 else slice(10, 16))
                yield b.inputs[part], b.targets[part], b.index[part]

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    method = SurrogateSharpness(lam=0.5, eps=0.06, lam_lr=1.0, hvp=hvp)
    model = fit(network, Share(), epochs=2, regularizer=method, criterion=squared_error,
                optimizer=partial(torch.optim.SGD, lr=0.1), accumulation=2).model
    result = (model.state_dict(), method.state_dict())
"""


@pytest.mark.slow
@pytest.mark.parametrize("hvp", ["exact", "finite_difference"])
def test_two_ranks_end_with_weights_and_multiplier_of_one_process(tmp_path, hvp):
    first, second, single = two_processes_and_one(tmp_path, SCRIPT, hvp)
    for part in (0, 1):
        for name, value in single[part].items():
            assert torch.equal(first[part][name], second[part][name]), name
            torch.testing.assert_close(first[part][name], value, rtol=0, atol=2e-6)

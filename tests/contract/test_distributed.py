"""Two processes under DistributedDataParallel agree with one."""

import torch
from two_processes import two_processes_and_one

SCRIPT = """
    from functools import partial
    from doubles import data, smooth_network
    from wellposed import Compose, fit
    from wellposed.gradients import SharpnessAwareMinimization
    from wellposed.indexed_dataset import TensorLoader
    from wellposed.losses import EarlyLearning

    X, Y = data()

    class Share:
        "Batches of 16, of which each rank takes unequal parts."
        def __init__(self):
            self.whole = TensorLoader(X, Y, batch_size=16, shuffle=True)
        def __len__(self):
            return len(self.whole)
        def set_epoch(self, epoch):
            self.whole.set_epoch(epoch)
        def __iter__(self):
            for b in self.whole:
                part = slice(None) if world == 1 else (slice(0, 10) if rank == 0 else slice(10, 16))
                yield b.inputs[part], b.targets[part], b.index[part]

    method = EarlyLearning(64, 4)
    model = fit(smooth_network(), Share(), epochs=2, regularizer=Compose(method, SharpnessAwareMinimization(0.05)),
                optimizer=partial(torch.optim.SGD, lr=0.1), accumulation=2).model
    result = (model.state_dict(), method.table.rows)
"""


def test_two_ranks_end_with_the_weights_and_tables_of_one_process(tmp_path):
    first, second, single = two_processes_and_one(tmp_path, SCRIPT)
    assert torch.equal(first[1], second[1])
    torch.testing.assert_close(first[1], single[1], rtol=0, atol=1e-6)
    for name, value in single[0].items():
        assert torch.equal(first[0][name], second[0][name])
        torch.testing.assert_close(first[0][name], value, rtol=0, atol=1e-6)

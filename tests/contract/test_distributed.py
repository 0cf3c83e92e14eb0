"""Two processes under DistributedDataParallel agree with one."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

SCRIPT = """
    import sys
    sys.path[:0] = [{support!r}]
    import torch
    import torch.distributed as dist
    from functools import partial
    from doubles import data, smooth_network
    from wellposed import Compose, fit
    from wellposed.gradients import SharpnessAwareMinimization
    from wellposed.indexed_dataset import TensorLoader
    from wellposed.losses import EarlyLearning

    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
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

    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{{folder}}/meet", rank=rank, world_size=world)
    method = EarlyLearning(64, 4)
    model = fit(smooth_network(), Share(), epochs=2, regularizer=Compose(method, SharpnessAwareMinimization(0.05)),
                optimizer=partial(torch.optim.SGD, lr=0.1), accumulation=2).model
    torch.save((model.state_dict(), method.table.rows), f"{{folder}}/{{world}}-{{rank}}.pt")
    if world > 1:
        dist.destroy_process_group()
"""


def test_two_ranks_end_with_the_weights_and_tables_of_one_process(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(SCRIPT).format(support=str(Path(__file__).parents[1] / "support")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(tmp_path)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank, world in ((0, 2), (1, 2), (0, 1))
    ]  # fmt: skip
    for run in runs:
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
    first, second, single = (torch.load(tmp_path / f"{name}.pt") for name in ("2-0", "2-1", "1-0"))
    assert torch.equal(first[1], second[1])
    torch.testing.assert_close(first[1], single[1], rtol=0, atol=1e-6)
    for name, value in single[0].items():
        assert torch.equal(first[0][name], second[0][name])
        torch.testing.assert_close(first[0][name], value, rtol=0, atol=1e-6)

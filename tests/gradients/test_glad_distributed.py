"""Under data parallelism all ranks move to one point, by the common gradient; with m-sharpness each to its own."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

SCRIPT = """
    import sys
    import torch
    import torch.distributed as dist
    from functools import partial
    from torch import nn
    from wellposed import fit
    from wellposed.gradients.sharpness_steering import RegularizedGradient
    from wellposed.indexed_dataset import TensorLoader

    rank, world, folder, sync = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "sync"
    torch.set_num_threads(1)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))

    class Share:
        "Batches of 8, of which each rank takes half."
        def __init__(self):
            self.whole = TensorLoader(x, torch.arange(40) % 3, batch_size=8, shuffle=True)
        def __len__(self):
            return len(self.whole)
        def set_epoch(self, epoch):
            self.whole.set_epoch(epoch)
        def __iter__(self):
            for b in self.whole:
                part = slice(rank * 8 // world, (rank + 1) * 8 // world)
                yield b.inputs[part], b.targets[part], b.index[part]

    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    method = RegularizedGradient(rho=0.5, rule="mix", lam=0.7, sync_perturbation=sync)
    model = fit(network, Share(), epochs=1, regularizer=method,
                optimizer=partial(torch.optim.SGD, lr=0.3, momentum=0.9), accumulation=2).model
    assert int(method.passes) == 5
    torch.save(model.state_dict(), f"{folder}/{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()
"""


def trained(folder, sync):
    script = folder / "rank.py"
    script.write_text(textwrap.dedent(SCRIPT))
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(folder), sync],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        )
        for rank, world in ((0, 2), (1, 2), (0, 1))
    ]  # fmt: skip
    for run in runs:
        _, errors = run.communicate(timeout=180)
        assert run.returncode == 0, errors
    states = [torch.load(folder / f"{name}.pt") for name in ("2-0", "2-1", "1-0")]
    return [torch.cat([value.reshape(-1) for value in state.values()]) for state in states]


@pytest.mark.slow
def test_two_ranks_are_one_process_on_the_whole_batch(tmp_path):
    first, second, single = trained(tmp_path, "sync")
    assert torch.equal(first, second)
    torch.testing.assert_close(first, single, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_with_m_sharpness_ranks_agree_but_not_with_one_process(tmp_path):
    first, second, single = trained(tmp_path, "local")
    assert torch.equal(first, second)
    assert not torch.allclose(first, single, atol=1e-4)

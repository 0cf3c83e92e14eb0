"""Half fine-tuning on two processes: the same half on both, wrapped anew in each stage; anything else is refused."""

import os
import subprocess
import sys
import textwrap

import torch

SCRIPT = """
    import sys
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from wellposed import fit
    from wellposed.weights.half_fine_tuning import HalfFineTuning

    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(4, 4) for _ in range(4))
        def forward(self, x):
            return x + self.o_proj(torch.tanh(self.q_proj(x)) * self.k_proj(x) + self.v_proj(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.lm_head = nn.ModuleList([Block(), Block()]), nn.Linear(4, 3)
        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.lm_head(x)

    torch.manual_seed(0)
    net = Net()
    method = HalfFineTuning(seed=1)
    generator = torch.Generator().manual_seed(rank)  # each rank has data of its own
    halves = []
    for stage in range(2):
        report = method.new_stage(net)
        halves.append(report.frozen)
        wrapped = DistributedDataParallel(net)
        try:
            method.new_stage(wrapped, force=True)
        except RuntimeError as error:
            assert "DistributedDataParallel" in str(error) and "wrap it anew" in str(error), error
        else:
            raise AssertionError("a wrapped model must be refused")
        optimizer = torch.optim.AdamW(method.trainable_parameters(), lr=0.05)
        start = {n: p.detach().clone() for n, p in net.named_parameters()}
        for _ in range(4):
            x = torch.randn(8, 4, generator=generator)
            optimizer.zero_grad()
            wrapped(x).square().mean().backward()
            optimizer.step()
        assert all(torch.equal(p, start[n]) for n, p in net.named_parameters() if n in report.frozen)
        for p in net.parameters():
            p.grad = None
    assert halves[0] != halves[1]

    data = torch.utils.data.TensorDataset(torch.randn(16, 4), torch.arange(16) % 3)
    try:
        fit(net, data, epochs=2, regularizer=HalfFineTuning(resample="epoch"))
    except RuntimeError as error:
        assert "resample='stage'" in str(error), error
    else:
        raise AssertionError("a new half under data parallelism must be refused")
    trained = fit(net, data, epochs=1, regularizer=method).model
    torch.save((trained.state_dict(), halves, method.mask()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
"""


def test_two_ranks_freeze_the_same_half_and_stay_equal(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(SCRIPT))
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for run in runs:
        _, errors = run.communicate(timeout=180)
        assert run.returncode == 0, errors
    (first, halves, mask), (second, others, other_mask) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert halves == others and mask == other_mask
    assert all(torch.equal(first[name], second[name]) for name in first)

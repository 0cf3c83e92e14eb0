"""Two processes that share every batch train a self-tuning network as one does; MAID refuses to share."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from doubles import MixedGradient, smooth_network

from wellposed import BilevelProblem
from wellposed.hyperparameter import Hyperparameter
from wellposed.objective import cross_entropy
from wellposed.tuning import MAID, SelfTuner
from wellposed.tuning.certified_problem import CertifiedProblem
from wellposed.tuning.lower_level import LowerLevel, UpperLoss

SCRIPT = """
    import sys
    sys.path[:0] = [{support!r}]
    import torch
    import torch.distributed as dist
    from doubles import data, smooth_network
    from wellposed import BilevelProblem, Compose
    from wellposed.hyperparameter import Hyperparameter
    from wellposed.losses import EarlyLearning, LabelSmoothing
    from wellposed.objective import cross_entropy
    from wellposed.tuning import SelfTuner
    from wellposed.weights import WeightDecay

    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{{folder}}/meet", rank=rank, world_size=world)
    X, Y = data()
    X = X.double()
    index = torch.arange(64)
    own = slice(None) if world == 1 else slice(8 * rank, 8 * rank + 8)
    batches = [tuple(t[i : i + 16][own] for t in (X, Y, index)) for i in range(0, 64, 16)]
    found = []
    for delta in (True, False):
        smoothing = Hyperparameter(0.1, 0.0, 1.0, per_example=True)
        strength = Hyperparameter(0.5, chart="exp", per_example=True)
        method = Compose(EarlyLearning(64, 4, strength=strength), LabelSmoothing(smoothing), WeightDecay(Hyperparameter(1e-2, chart="exp")))
        problem = BilevelProblem.from_regularizer(smooth_network().double(), method, cross_entropy)
        tuner = SelfTuner(problem, delta=delta, train_steps=2, clip_norm=0.5)
        history = tuner.run(batches, batches[::-1], steps=8)
        found += [tuner.u.detach(), tuner.scale, method.regularizers[0].table.rows]
        found += [torch.tensor([entry.inner_loss for entry in history]), *(p.detach() for p in problem.params.values())]
    torch.save(found, f"{{folder}}/{{world}}-{{rank}}.pt")
    if world > 1:
        dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(SCRIPT).format(support=str(Path(__file__).parents[1] / "support")))
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        )
        for rank, world in ((0, 2), (1, 2), (0, 1))
    ]  # fmt: skip
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    first, second, single = (torch.load(tmp_path / f"{name}.pt") for name in ("2-0", "2-1", "1-0"))
    assert len(single) > 10
    for a, b, one in zip(first, second, single, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, one, rtol=1e-6, atol=1e-8)


@pytest.fixture
def two_processes(monkeypatch):
    for module in ("self_tuning_checks", "maid"):
        monkeypatch.setattr(f"wellposed.tuning.{module}.distributed", lambda: True)


def test_a_method_that_reevaluates_gradients_is_refused_before_the_network_is_converted(two_processes):
    network = smooth_network()
    network.strength = Hyperparameter(1.0)
    problem = BilevelProblem.from_regularizer(network, MixedGradient(), cross_entropy)
    with pytest.raises(ValueError, match="SelfTuner: data parallelism is not supported for MixedGradient"):
        SelfTuner(problem)
    assert type(network[0]) is torch.nn.Linear


def test_maid_refuses_to_share_a_loss(two_processes):
    lower = LowerLevel(
        lambda x, v: 0.5 * (x - 1).square().sum() + 0.5 * v["weight"] * x.square().sum(),
        torch.zeros(2, dtype=torch.float64), {"weight": Hyperparameter(1.0, chart="exp")}, mu=lambda v: 1 + v["weight"],
        L=lambda v: 1 + v["weight"], quadratic=True, L_J=lambda v: v["weight"],
    )  # fmt: skip
    upper = UpperLoss(lambda x: 0.5 * (x - 0.8).square().sum(), L_g=1.0, convex=True)
    with pytest.raises(
        ValueError, match="MAID: data parallelism is not supported; its steps are certified for one loss"
    ):
        MAID(CertifiedProblem(lower, upper))

"""Two processes that share every batch take the steps of one."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

SCRIPT = """
    import sys
    sys.path[:0] = [{support!r}]
    import torch
    import torch.distributed as dist
    from bilevel_doubles import Recorder, noises, quadratic
    from wellposed.tuning import BOREP

    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{{folder}}/meet", rank=rank, world_size=world)
    pairs = noises(80)
    means = [(a + b) / 2 for a, b in zip(pairs[::2], pairs[1::2])]
    train, validation = (Recorder(means if world == 1 else pairs[rank::2]) for _ in range(2))
    problem = quadratic()
    tuner = BOREP(problem, 0.1, 0.1, 0.1, refine_steps=5)
    for _ in range(10):
        tuner.step(train, validation)
    torch.save((problem.hypers["x"].raw, problem.params["y"].detach(), tuner.z[0]), f"{{folder}}/{{world}}-{{rank}}.pt")
    if world > 1:
        dist.destroy_process_group()
"""


@pytest.mark.slow
def test_oracles_are_averaged_over_the_processes_before_anything_is_normalised(tmp_path):
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
    for a, b, one in zip(first, second, single, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, one, rtol=1e-9, atol=1e-12)

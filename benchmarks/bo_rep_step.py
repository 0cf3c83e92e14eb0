"""BO-REP's oracles against a plain training step: pairs in turn, one process; beside betty-ml where it is installed.

Second derivatives: one Hessian product and one mixed product, against one plain step (forward, backward, SGD). Exact
ones come from one graph: in matrix products of a dense network that is 8 units against 3, so 2.7 is the floor there.
Differences of two gradients (derivatives="differences") are two plain evaluations, to about four digits.
Step: a whole BO-REP step with I = N = 1 (a lower step, a validation gradient, both second derivatives, the updates).
Memory: peak of a fresh process over what it holds before the first step.
"""

import importlib.util
import logging
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

from wellposed import BilevelProblem, Hyperparameter
from wellposed.tuning import BOREP

BATCH, WIDTH, PAIRS = 256, 512, 61


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10))


def batch(size=BATCH):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 64, generator=generator), torch.randint(0, 10, (size,), generator=generator)


def problem_of(model, derivatives="exact"):
    decay = Hyperparameter(1e-3, chart="exp")

    def outer(params, hypers, data):
        return nn.functional.cross_entropy(torch.func.functional_call(model, params, (data[0],)), data[1])

    def inner(params, hypers, data):
        return outer(params, hypers, data) + hypers["decay"] * sum(p.square().sum() for p in params.values())

    return BilevelProblem(model, inner, outer, hypers={"decay": decay}, derivatives=derivatives)


def plain_step(data):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=2e-3)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()

    return step


def second_derivatives(data, derivatives="exact"):
    problem = problem_of(network(), derivatives)
    vector = {name: torch.randn_like(p) for name, p in problem.params.items()}
    return lambda: problem.second_derivatives(vector, data)


def differences(data):
    return second_derivatives(data, "differences")


def bo_rep_step(data, derivatives="exact"):
    tuner = BOREP(
        problem_of(network(), derivatives), 0.01, 0.01, 0.01, period=1, inner_steps=1, refine_steps=0, reuse_batch=True
    )
    feed = iter(lambda: data, None)
    return lambda: tuner.step(feed, feed)


def betty_step(data, kind):
    """One iteration of betty's engine: a lower step and an upper one, the hypergradient by `kind`."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    class Upper(ImplicitProblem):
        def training_step(self, drawn):
            return nn.functional.cross_entropy(self.lower(drawn[0]), drawn[1])

    class Lower(ImplicitProblem):
        def training_step(self, drawn):
            penalty = sum(p.square().sum() for p in self.trainable_parameters())
            return nn.functional.cross_entropy(self.module(drawn[0]), drawn[1]) + self.upper().exp() * penalty

    class Decay(nn.Module):
        def __init__(self):
            super().__init__()
            self.raw = nn.Parameter(torch.tensor(-7.0))

        def forward(self):
            return self.raw

    upper, lower = Decay(), network()
    loader = [data]
    config = Config(type=kind, unroll_steps=1, neumann_iterations=1, cg_iterations=1)
    problems = [
        Upper(name="upper", module=upper, optimizer=torch.optim.SGD(upper.parameters(), lr=1.0), train_data_loader=loader,
              config=Config(type=kind)),
        Lower(name="lower", module=lower, optimizer=torch.optim.SGD(lower.parameters(), lr=0.01), train_data_loader=loader,
              config=config),
    ]  # fmt: skip
    engine = Engine(
        config=EngineConfig(train_iters=1, logger_type="none"), problems=problems,
        dependencies={"u2l": {problems[0]: [problems[1]]}, "l2u": {problems[1]: [problems[0]]}},
    )  # fmt: skip
    logging.disable(logging.INFO)
    engine.train_step()
    if upper.raw.item() == -7.0:
        raise RuntimeError("the upper level did not move")
    return engine.train_step


CANDIDATES = {
    "plain": plain_step,
    "second derivatives": second_derivatives,
    "differences": differences,
    "BO-REP step": bo_rep_step,
}


def kilobytes(name, data):
    """Growth of this process's largest resident memory over a few calls."""
    step = CANDIDATES[name](data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(5):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def memory(name):
    command = [sys.executable, __file__, "--memory", name]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def compare(rival, mine, pairs, label):
    """Alternating pairs; the median ratio with a 95 % interval from order statistics."""
    for step in (rival, mine):
        step()
    ratios, own = [], []
    for number in range(pairs):
        taken = {}
        for which in ((rival, mine), (mine, rival))[number % 2]:
            started = time.perf_counter()
            which()
            taken[which] = time.perf_counter() - started
        ratios.append(taken[mine] / taken[rival])
        own.append(taken[mine])
    ratios.sort()
    rank = max(0, int((pairs - 1.96 * pairs**0.5) / 2))
    middle = f"{statistics.median(ratios):.3f} [{ratios[rank]:.3f}, {ratios[-1 - rank]:.3f}]"
    print(f"{label:<44} {1e3 * statistics.median(own):8.2f} ms; ratio {middle}, {pairs} pairs")


def main(pairs=PAIRS):
    torch.set_num_threads(1)
    data = batch()
    compare(plain_step(data), second_derivatives(data), pairs, "both second derivatives / plain step")
    compare(plain_step(data), differences(data), pairs, "both by differences / plain step")
    compare(plain_step(data), bo_rep_step(data), pairs, "BO-REP step, I = N = 1 / plain step")
    compare(plain_step(data), bo_rep_step(data, "differences"), pairs, "the same, by differences / plain step")
    if importlib.util.find_spec("betty") is not None:
        for kind in ("darts", "neumann", "cg"):
            try:
                rival = betty_step(data, kind)
            except Exception as error:  # an old package beside a new torch: say so, and go on
                print(f"betty-ml, {kind}: does not run here ({type(error).__name__}: {error})")
                continue
            compare(rival, bo_rep_step(data), pairs, f"BO-REP step / betty-ml's iteration, {kind}")
    else:
        print("betty-ml is not installed: pip install betty-ml")
    sizes = {name: memory(name) for name in CANDIDATES}
    for name in list(CANDIDATES)[1:]:
        print(f"memory, {name}: {sizes[name] / 1024:.1f} MiB; / plain step: {sizes[name] / max(1, sizes['plain']):.2f}")


if __name__ == "__main__":
    if "--memory" in sys.argv:
        torch.set_num_threads(1)
        # A batch that dwarfs the parameters: activations are what a second derivative keeps longer.
        print(kilobytes(sys.argv[-1], batch(8192)))
    else:
        main(*map(int, sys.argv[1:]))

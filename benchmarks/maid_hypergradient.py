"""One hypergradient of a logistic regression with a weight for each coefficient: memory and time beside other ways.

Problem: 2,000 examples, 200 features, one log-weight a coefficient; upper loss on 1,000 others; all start at zero and
solve to a gradient of 1e-8, in float64. Ways, in turn, in one process, on one thread:

- `argmin`: accelerated gradient to a certified accuracy, one linear system in the backward pass;
- unrolled: autograd through the same iterations;
- jaxopt (where it is installed): its gradient descent with acceleration and implicit differentiation, compiled.

Memory is what the graph keeps for the backward pass, by the number of inner iterations: exact bytes, not an estimate.
betty is not here: its engine takes a fixed number of inner steps and has no accuracy that could be made equal.
"""

import statistics
import sys
import time

import numpy as np
import torch

from wellposed.tuning import argmin, solve_strongly_convex

EXAMPLES, HELD_OUT, FEATURES, LOG_WEIGHT, TOLERANCE, PAIRS = 2000, 1000, 200, -6.0, 1e-8, 15


def data():
    """Inputs and labels in {-1, 1} for both levels, as NumPy arrays."""
    generator = np.random.default_rng(0)
    planted = generator.normal(size=FEATURES)
    parts = []
    for count in (EXAMPLES, HELD_OUT):
        inputs = generator.normal(size=(count, FEATURES))
        parts += [inputs, np.where(inputs @ planted + 3 * generator.normal(size=count) > 0, 1.0, -1.0)]
    return parts


class Torch:
    """Both losses in torch."""

    def __init__(self):
        self.X, self.y, self.V, self.s = map(torch.from_numpy, data())
        self.L_data = float(torch.linalg.eigvalsh(self.X.T @ self.X)[-1]) / (4 * EXAMPLES)
        self.x0 = torch.zeros(FEATURES, dtype=torch.float64)
        self.theta = torch.full((FEATURES,), LOG_WEIGHT, dtype=torch.float64, requires_grad=True)
        self.mu, self.L = float(np.exp(LOG_WEIGHT)), self.L_data + float(np.exp(LOG_WEIGHT))

    def inner(self, w, theta):
        return torch.nn.functional.softplus(-self.y * (self.X @ w)).mean() + 0.5 * (theta.exp() * w.square()).sum()

    def outer(self, w):
        return torch.nn.functional.softplus(-self.s * (self.V @ w)).mean()

    def implicit(self, eps=None):
        eps = TOLERANCE / self.mu if eps is None else eps
        w = argmin(self.inner, self.theta, self.x0, self.mu, self.L, eps=eps, delta=TOLERANCE)
        return w, torch.autograd.grad(self.outer(w), self.theta)[0]

    def iterations(self, eps):
        """What the inner solver takes to an accuracy."""
        fixed = self.theta.detach()
        return solve_strongly_convex(lambda w: self.inner(w, fixed), self.x0, self.mu, self.L, eps).iterations

    def unrolled(self, iterations):
        root = (self.L / self.mu) ** 0.5
        momentum = (root - 1) / (root + 1)
        x = z = self.x0.clone().requires_grad_()
        for _ in range(iterations):
            slope = torch.autograd.grad(self.inner(z, self.theta), z, create_graph=True)[0]
            before, x = x, z - slope / self.L
            z = x + momentum * (x - before)
        return x


def kept_bytes(build):
    """Bytes that the graph of a result keeps alive, each storage once."""
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = build()
    return sum(seen.values()), kept


def memory(problem):
    print("bytes that the graph keeps, by inner iterations (the data themselves: "
          f"{problem.X.nbytes + problem.y.nbytes:,})")  # fmt: skip
    for eps in (1e1, 1e-2, 1e-6):
        iterations = problem.iterations(eps)
        unrolled, _ = kept_bytes(lambda n=iterations: problem.unrolled(n))
        w = argmin(problem.inner, problem.theta, problem.x0, problem.mu, problem.L, eps=eps, delta=TOLERANCE)
        implicit = sum(tensor.nbytes for tensor in w.grad_fn.saved_tensors)
        print(f"  {iterations:4d} iterations: argmin {implicit:12,d}   unrolled {unrolled:14,d}")


def jaxopt_hypergradient(problem):
    """A compiled function, or None where jaxopt is not installed."""
    try:
        import jax

        jax.config.update("jax_enable_x64", True)
        import jax.numpy as jnp
        import jaxopt
    except ImportError:
        return None
    X, y, V, s = map(jnp.asarray, data())

    def inner(w, theta):
        return jnp.logaddexp(0.0, -y * (X @ w)).mean() + 0.5 * (jnp.exp(theta) * w**2).sum()

    solver = jaxopt.GradientDescent(
        inner, stepsize=1.0 / problem.L, acceleration=True, maxiter=100_000, tol=TOLERANCE, implicit_diff=True
    )

    def outer(theta):
        w = solver.run(jnp.zeros(FEATURES), theta).params
        return jnp.logaddexp(0.0, -s * (V @ w)).mean()

    compiled = jax.jit(jax.grad(outer))
    theta = jnp.full(FEATURES, LOG_WEIGHT)
    return lambda: np.asarray(compiled(theta).block_until_ready())


def main(pairs=PAIRS):
    torch.set_num_threads(1)
    problem = Torch()
    memory(problem)
    reference = problem.implicit(eps=1e-11)[1].numpy()
    ways = {"argmin": lambda: problem.implicit()[1].numpy()}
    iterations = problem.iterations(TOLERANCE / problem.mu)
    ways["unrolled"] = lambda: torch.autograd.grad(problem.outer(problem.unrolled(iterations)), problem.theta)[
        0
    ].numpy()
    peer = jaxopt_hypergradient(problem)
    if peer is None:
        print("jaxopt is not installed: left out")
    else:
        ways["jaxopt"] = peer
    times = {name: [] for name in ways}
    for number in range(pairs + 1):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            started = time.perf_counter()
            found = ways[name]()
            taken = time.perf_counter() - started
            if number == 0:  # the first round warms up and compiles
                error = np.linalg.norm(found - reference) / np.linalg.norm(reference)
                print(f"{name:<10} relative error of the hypergradient {error:.1e}")
            else:
                times[name].append(taken)
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, times["argmin"], strict=True))
        # 95 % for the median: order statistics of the binomial distribution, normal approximation.
        rank = max(0, int((pairs - 1.96 * pairs**0.5) / 2))
        print(
            f"{name:<10} median {1e3 * statistics.median(values):8.2f} ms a hypergradient; "
            f"/ argmin: {statistics.median(ratios):.3f} [{ratios[rank]:.3f}, {ratios[-1 - rank]:.3f}], {pairs} pairs"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

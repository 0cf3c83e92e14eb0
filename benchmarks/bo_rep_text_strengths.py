"""Strengths of a recurrent reader of mails, learned on real text: BO-REP beside searches, at equal gradient evaluations.

A tanh recurrent network reads the first 40 words of a mail. It trains on 600 mails under a weight decay for
each of its four layers and under label smoothing: five strengths, all differentiable (a dropout rate is not). Every arm
has the same budget. A gradient of the training or of the validation loss, a Hessian product and a mixed product count
one each; a search pays for every training step of every trial. Looks at the validation loss need no gradient, come
equally often in every arm, and choose its checkpoint. All arms train by the same SGD.

A demonstration, not a study: learning rates were chosen by hand on seed 0, for all arms; those of the bilevel arms are
one to four numbers more than a search needs, and were tried a few times. Seeds from 1000 are reported.

Needs the mails: wellposed data get spam-assassin
Usage: python benchmarks/bo_rep_text_strengths.py [seeds] [budget] [first seed]
"""

import math
import sys
import time
from functools import partial

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from wellposed import TensorLoader
from wellposed.datasets import DatasetNotInstalled
from wellposed.integrations import OptunaSearch
from wellposed.loading import EndlessBatches
from wellposed.step import DivergenceError
from wellposed.studies.problems.mail_sequences import BOXES, LAYERS, MailReader, mail_sequences, reading_problem
from wellposed.tuning import BOREP, OneStepUnrolled, RandomSearch, clipped_ma_soba
from wellposed.tuning.search import Search
from wellposed.tuning.snapshot import Snapshot
from wellposed.tuning.validation_loss import validation_loss

TRAIN, VALIDATION, BATCH = 600, 300, 50
BUDGET, TRIALS, LOOKS = 1200, 6, 24
LR, REFINE = 1.0, 50


def boxes(problem):
    return {name: BOXES[name.rpartition(".")[2]] for name in problem.hypers}


def search(make, trials, problem, budget, seed):
    steps = budget // trials
    sgd = partial(torch.optim.SGD, lr=LR)
    return make(
        problem, steps, seed=seed, weight_optimizer=sgd, boxes=boxes(problem), evaluate_every=max(1, budget // LOOKS)
    )


def one_step(problem, budget, seed):
    return OneStepUnrolled(problem, inner_lr=LR, outer_lr=0.02)


def clipped(problem, budget, seed):
    rates = {"outer_lr": 3.0, "inner_lr": LR, "z_lr": 0.03, "clip": 0.02}
    return clipped_ma_soba(problem, **rates, schedule="cosine", total_steps=budget // 4)


def bo_rep(problem, budget, seed):
    steps = 2 * (budget - REFINE) // 9  # two steps cost a period of three lower ones and twice three second-order calls
    rates = {"outer_lr": 0.03, "inner_lr": LR, "z_lr": 0.03}
    return BOREP(problem, **rates, refine_steps=REFINE, schedule="cosine", total_steps=steps)


# Name, what makes the tuner, and the calls that its dearest step after the first can take.
ARMS = {
    "fixed defaults": (partial(search, RandomSearch, 1), 1),
    "random search": (partial(search, RandomSearch, TRIALS), 1),
    "Optuna TPE": (partial(search, OptunaSearch, TRIALS), 1),
    "one unrolled step": (one_step, 3),
    "MA-SOBA, clipped": (clipped, 4),
    "BO-REP": (bo_rep, 6),
}


def spent(problem):
    counts = problem.counts
    return counts.inner_grad + counts.outer_grads + counts.hvp + counts.mixed_vjp


def learn(problem, tuner, dearest, data, budget):
    """Step until the next step might not fit into the budget; go back to the best look."""
    train = EndlessBatches(TensorLoader(data.train, data.labels, batch_size=BATCH, shuffle=True), "train")
    held_out = data.validation, data.validation_labels
    validation = EndlessBatches(TensorLoader(*held_out, batch_size=BATCH, shuffle=True), "validation")
    every = budget // LOOKS
    due, best = every, (math.inf, None)
    try:
        while spent(problem) + dearest <= budget:
            tuner.step(train, validation)
            if not isinstance(tuner, Search) and spent(problem) >= due:
                due += every
                look = validation_loss(problem, iter([held_out]), 1)
                if look < best[0]:
                    best = look, Snapshot.take(problem)
    except DivergenceError as error:
        print(error, file=sys.stderr)
    if isinstance(tuner, Search):
        tuner.export()
    elif best[1] is not None:
        best[1].restore(problem)


@torch.no_grad()
def measured(model, words, labels):
    logits = model.eval()(words)
    return 100 * float((logits.argmax(1) != labels).double().mean()), float(cross_entropy(logits, labels))


def strengths(problem):
    found = {name.rpartition(".")[2]: h().detach() for name, h in problem.hypers.items()}
    return [*found["strength"].tolist(), float(found["smoothing"])]


def main(seeds=4, budget=BUDGET, first=1000):
    torch.set_num_threads(1)
    rows = {name: [] for name in ARMS}
    for seed in range(first, first + seeds):
        data = mail_sequences(seed, TRAIN, VALIDATION)
        for name, (make, dearest) in ARMS.items():
            torch.manual_seed(seed)
            problem = reading_problem(MailReader(seed=seed), seed)
            tuner = make(problem, budget, seed)
            started = time.process_time()
            learn(problem, tuner, dearest, data, budget)
            seconds = time.process_time() - started
            error, loss = measured(problem.model, data.test, data.test_labels)
            held_out = measured(problem.model, data.validation, data.validation_labels)
            print(f"seed {seed}, {name}: test error {error:.2f} %, {seconds:.0f} s", file=sys.stderr, flush=True)
            rows[name].append([error, loss, *held_out, spent(problem), seconds, *strengths(problem)])
    show(rows, seeds)


def show(rows, seeds):
    print(
        f"{'':<20}{'test error, %':>16}{'test loss':>16}{'validation, %':>16}{'its loss':>11}{'calls':>8}{'CPU s':>8}"
    )
    for name, values in rows.items():
        table = np.array(values)
        mean, deviation = table.mean(0), table.std(0, ddof=1) if seeds > 1 else np.zeros(table.shape[1])
        line = f"{name:<20}{mean[0]:>9.2f} ± {deviation[0]:<4.2f}{mean[1]:>9.3f} ± {deviation[1]:<5.3f}"
        line += f"{mean[2]:>8.2f} ± {deviation[2]:<4.2f}{mean[3]:>11.3f}{mean[4]:>8.0f}{np.median(table[:, 5]):>8.1f}"
        print(line)
    print(f"({seeds} seeds, mean ± standard deviation)\n")
    print(f"strengths kept{'':<6}" + "".join(f"{'decay ' + name:>23}" for name in LAYERS) + f"{'smoothing':>16}")
    for name, values in rows.items():
        found = np.array(values)[:, 6:]
        typical, factor = np.exp(np.log(found[:, :-1]).mean(0)), np.exp(np.log(found[:, :-1]).std(0))
        line = "".join(f"{f'{t:.1e} x/ {f:.1f}':>23}" for t, f in zip(typical, factor, strict=True))
        print(f"{name:<20}{line}{f'{found[:, -1].mean():.3f} ± {found[:, -1].std():.3f}':>16}")
    print("(geometric mean of the decays, times or divided by their spread)")


if __name__ == "__main__":
    try:
        main(*map(int, sys.argv[1:]))
    except DatasetNotInstalled as missing:
        sys.exit(str(missing))

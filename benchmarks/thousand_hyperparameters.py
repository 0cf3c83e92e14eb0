"""A thousand hyperparameters learned in one run, and what searches make of them.

scikit-learn's digits, 1000 training examples of which 40 % carry a wrong label, 50 clean ones to validate on; one weight
for every training example, softmax regression. BO-REP and clipped MA-SOBA learn the weights in one training. A search
proposes all 1000 numbers anew for every whole training: it gets as many trainings as fit into three times the gradients.

Printed: test error, how well the weights separate wrong labels (AUROC, 0.5 is chance), trainings, gradients, seconds.
"""

import sys
import time
import warnings
from functools import partial

import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from wellposed import BilevelProblem, Compose, TensorLoader
from wellposed.integrations import OptunaSearch
from wellposed.objective import cross_entropy
from wellposed.studies.problems.hyper_cleaning import cleaning_data
from wellposed.tuning import BOREP, RandomSearch, SampleWeights, clipped_ma_soba
from wellposed.weights import WeightDecay

STEPS = 1500
BATCH = 64


def error(model, data):
    with torch.no_grad():
        return 100 * float((model(data.test).argmax(1) != data.test_labels.argmax(1)).float().mean())


def learn(name, make, steps, data, gradients_a_step):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(65, 10, bias=False))
    nn.init.zeros_(model[0].weight)
    weights = SampleWeights(len(data.train), init=0.5)
    train = TensorLoader(data.train, data.labels, batch_size=BATCH, shuffle=True)
    validation = TensorLoader(data.validation, data.validation_labels, batch_size=50)
    problem = BilevelProblem.from_regularizer(model, Compose(weights, WeightDecay(1e-3)), cross_entropy)
    started = time.perf_counter()
    tuner = make(problem)
    tuner.run(train, validation, steps)
    plain = tuner.export()
    seconds = time.perf_counter() - started
    trainings = len(getattr(tuner, "trials", [None]))
    auroc = roc_auc_score((~data.wrong).int(), weights.weights().numpy())
    gradients = round(steps * gradients_a_step)
    print(f"{name:<24} {error(plain, data):6.1f} %  {auroc:6.3f}  {trainings:4d}  {gradients:8d}  {seconds:6.1f} s")


def main(seed=0):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    data = cleaning_data(seed)
    print(f"1000 weights of examples, digits with 40 % wrong labels, seed {seed}")
    print(f"{'':<24} {'error':>8}  {'AUROC':>6}  runs  gradients     time")
    # A gradient of the validation loss, a Hessian and a mixed product, and 3 / 2 training gradients a step.
    learn("BO-REP", partial(BOREP, outer_lr=1.0, inner_lr=0.3, z_lr=0.3, schedule="cosine"), STEPS, data, 4.5)
    learn(
        "MA-SOBA, clipped",
        partial(clipped_ma_soba, outer_lr=30.0, inner_lr=0.3, z_lr=0.3, clip=1.0, schedule="cosine"),
        STEPS, data, 4.0,
    )  # fmt: skip
    sgd = partial(torch.optim.SGD, lr=0.3)
    search = {"steps_per_trial": 500, "weight_optimizer": sgd}
    trials = int(3 * 4.5 * STEPS / 500)
    learn("random search", lambda p: RandomSearch(p, **search, **_named(p)), 500 * trials, data, 1.0)
    learn("TPE", lambda p: OptunaSearch(p, **search, **_named(p)), 500 * trials, data, 1.0)
    learn("all weights 1/2", lambda p: RandomSearch(p, **search, **_named(p)), 500, data, 1.0)


def _named(problem):
    return {"boxes": dict.fromkeys(problem.hypers, (0.01, 0.99))}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

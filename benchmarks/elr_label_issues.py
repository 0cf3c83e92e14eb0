"""Finding wrong labels: ELR in one training run beside cleanlab on cross-validated probabilities, same network."""

import statistics
import time
from functools import partial

import numpy as np
import torch
from cleanlab.filter import find_label_issues
from sklearn.model_selection import StratifiedKFold

from wellposed import TensorLoader, fit
from wellposed.compare.models import default_model
from wellposed.compare.source import read_source
from wellposed.compare.task import Task
from wellposed.evaluation import predict
from wellposed.losses import EarlyLearning

SEEDS, FOLDS, EPOCHS = 5, 5, 40


def trained(task, inputs, targets, seed, regularizer=None):
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)
    loader = TensorLoader(inputs, targets, shuffle=True, seed=seed)
    return fit(
        default_model(task, seed), loader, epochs=EPOCHS, optimizer=optimizer, regularizer=regularizer, seed=seed
    ).model


def by_elr(task, inputs, targets, seed):
    method = EarlyLearning(len(targets), task.num_outputs)
    trained(task, inputs, targets, seed, method)
    return method.label_issues(targets).numpy()


def by_cleanlab(task, inputs, targets, seed):
    probabilities = np.zeros((len(targets), task.num_outputs))
    for train, held in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(inputs, targets):
        model = trained(task, inputs[train], targets[train], seed)
        probabilities[held] = predict(model, TensorLoader(inputs[held], targets[held]))[0].softmax(1).numpy()
    return find_label_issues(targets.numpy(), probabilities, n_jobs=1)


def main():
    torch.set_num_threads(1)
    task = Task.prepare(read_source("digits"), 0.4)
    rows = {"ELR, one run": [], f"cleanlab, {FOLDS} folds": []}
    for seed in range(SEEDS):
        data = task.tensors(seed)
        inputs, targets = data["train_inputs"], data["train_targets"]
        wrong = (targets != data["true_targets"]).numpy()
        for name, find in zip(rows, (by_elr, by_cleanlab), strict=True):
            started = time.perf_counter()
            found = find(task, inputs, targets, seed)
            seconds = time.perf_counter() - started
            rows[name].append(((found & wrong).sum() / found.sum(), (found & wrong).sum() / wrong.sum(), seconds))
    print(f"digits, 40 % of {task.sizes['train']} training labels flipped, {SEEDS} seeds, means; median seconds")
    for name, values in rows.items():
        precision, recall, _ = np.mean(values, axis=0)
        print(
            f"{name:<18} precision {precision:.3f}  recall {recall:.3f}  {statistics.median(v[2] for v in values):6.2f} s"
        )


if __name__ == "__main__":
    main()

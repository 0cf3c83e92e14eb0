"""Training on images as published: the data of a trial, a record of every epoch, and runs that survive a kill."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...compose import Compose
from ...evaluation import predict
from ...fit import fit
from ...indexed_dataset import TensorLoader
from ...lab.protocol import Protocol
from ...lab.trial import Trial, TrialResult
from ...metrics import area_under_risk_coverage, expected_calibration_error, negative_log_likelihood
from ...regularizer import Regularizer
from ...step import DivergenceError, Step
from ...weights import WeightDecay
from ..networks import build_network
from ..problems.cifar import cifar_folder, noisy_images
from ..problems.image_transforms import CropAndFlip, Normalise
from ..training import accuracy
from .recipe import Recipe

Settings = Mapping[str, Any]
MethodFactory = Callable[[Settings, "ImageTask"], Regularizer | None]
"""From a trial's settings and its task to the method, or None for plain training."""

CHECKPOINTS = "WELLPOSED_CHECKPOINTS"
"""Environment variable that names the folder of unfinished runs; wellposed-report/checkpoints by default."""

_EVALUATED_AT_ONCE = 1000


class EpochRecord(Regularizer):
    """Accuracies after every epoch, in points, kept in the checkpoint. The last method of a `Compose`.

    It measures at the start of the next epoch, when the methods before it have chosen their prefix or weights.

    Args:
        test: loader of test examples; None while tuning.
    """

    def __init__(self, test: TensorLoader | None) -> None:
        super().__init__()
        self.test = test
        self.curves: dict[str, list[float]] = {}

    def on_epoch(self, step: Step) -> None:
        if step.epoch == 0 or step.epoch <= max(map(len, self.curves.values()), default=0):
            return
        if step.validation is not None:
            self._add("validation", 100.0 * step.validate()["accuracy"])
        if self.test is not None:
            self._add("test", accuracy(*predict(step.model, self.test)))

    def _add(self, name: str, value: float) -> None:
        self.curves.setdefault(name, []).append(value)

    def get_extra_state(self) -> dict[str, Any]:
        """What an exact resume needs."""
        return {"curves": self.curves}

    def set_extra_state(self, state: Any) -> None:
        """Continue from `get_extra_state`."""
        self.curves = state["curves"]

    def metrics(self) -> dict[str, float]:
        """Score and accuracies at the last epoch, at the best validation epoch, and at the best epoch of all."""
        found: dict[str, float] = {}
        validation, test = self.curves.get("validation"), self.curves.get("test")
        if validation:
            best = max(range(len(validation)), key=validation.__getitem__)  # the first of equals
            found |= {"score": validation[-1], "best_score": validation[best]}
            if test:
                found["accuracy_best_validation"] = test[best]
        if test:
            found |= {"accuracy": test[-1], "error": 100.0 - test[-1], "best_epoch_accuracy": max(test)}
        return found


class ImageTask:
    """The data of a trial on its device, and the training of networks on them.

    Args:
        trial: its settings name `dataset`, `network` and, optionally, `width`, `noise`, `rate`, `held_out`,
            `noisy_validation`. Its seed re-draws the split, the noise, the initialisation and the order.
    """

    def __init__(self, trial: Trial) -> None:
        settings = trial.settings
        self.trial, self.settings = trial, settings
        problem = noisy_images(
            str(settings["dataset"]),
            trial.seed,
            rate=float(settings.get("rate", 0.0)),
            noise=str(settings.get("noise", "none")),  # type: ignore[arg-type]
            held_out=float(settings.get("held_out", 0.1)),
            noisy_validation=bool(settings.get("noisy_validation", True)),
        )
        self.device = choose_device(trial)
        self.num_examples, self.num_classes = len(problem.labels), problem.classes
        self.images, self.labels = problem.train.to(self.device), problem.labels.to(self.device)
        self.wrong = problem.wrong.to(self.device)
        self.plain = Normalise(self.images)
        self.validation = self._plain_loader(problem.validation, problem.validation_labels)
        testing = trial.phase == "evaluate"
        self.test = self._plain_loader(problem.test, problem.test_labels) if testing else None

    def network(self, seed: int | None = None, *, bias: bool = True) -> nn.Module:
        """A fresh network of the trial's kind, on its device."""
        settings = self.settings
        network = build_network(
            str(settings["network"]),
            self.num_classes,
            width=float(settings.get("width", 1.0)),
            bias=bias,
            seed=self.trial.seed if seed is None else seed,
        )
        return network.to(self.device)

    def train(
        self,
        model: nn.Module,
        recipe: Recipe,
        method: Regularizer | None = None,
        *,
        checkpoint: Path | None = None,
        seed: int | None = None,
    ) -> tuple[nn.Module, EpochRecord]:
        """`fit` with crops and flips; returns the finished model and its record.

        Args:
            model: network, or a `Pair` of two.
            recipe: how.
            method: the regularizer, or None.
            checkpoint: file from which a killed run continues.
            seed: of order, augmentation and method; the trial's by default.
        """
        record = EpochRecord(self.test)
        parts: list[Regularizer] = [] if method is None else [method]
        if recipe.decay_on == "weights":
            parts.append(WeightDecay(recipe.weight_decay, on="weights"))
        seed = self.trial.seed if seed is None else seed
        loader = TensorLoader(
            self.images,
            self.labels,
            batch_size=recipe.batch_size,
            shuffle=True,
            drop_last=recipe.drop_last and self.num_examples > recipe.batch_size,
            seed=seed,
            transform=CropAndFlip(self.plain),
        )
        result = fit(
            model,
            loader,
            epochs=recipe.all_epochs,
            regularizer=Compose(*parts, record),
            optimizer=partial(
                torch.optim.SGD,
                lr=recipe.learning_rate,
                momentum=0.9,
                nesterov=recipe.nesterov,
                weight_decay=recipe.weight_decay if recipe.decay_on == "all" else 0.0,
            ),
            scheduler=recipe.schedule,
            amp=torch.bfloat16 if recipe.bf16 else None,
            validation=self.validation,
            device=self.device,
            seed=seed,
            checkpoint=checkpoint,
        )
        return result.model, record

    def result(self, model: nn.Module, record: EpochRecord) -> TrialResult:
        """Metrics of a finished model: accuracies in points, NLL in nats, ECE in points, AURC times 1000."""
        metrics = record.metrics()
        if self.test is not None:
            logits, labels = predict(model, self.test)
            logits = logits.float()
            metrics |= {
                "nll": float(negative_log_likelihood(logits, labels)),
                "ece": 100.0 * float(expected_calibration_error(logits, labels, num_bins=10)),
                "aurc": 1000.0 * float(area_under_risk_coverage(logits, labels)),
            }
            if bool(self.wrong.any()):
                # Memorised: a wrong label that the network predicts as given.
                loader = self._plain_loader(self.images[self.wrong], self.labels[self.wrong])
                assert loader is not None
                metrics["memorised"] = accuracy(*predict(model, loader)) / 100.0
        return TrialResult(metrics, record.curves)

    def _plain_loader(self, images: Tensor, labels: Tensor) -> TensorLoader | None:
        if len(labels) == 0:
            return None
        return TensorLoader(
            images.to(self.device), labels.to(self.device), batch_size=_EVALUATED_AT_ONCE, transform=self.plain
        )


def chosen(methods: Mapping[str, MethodFactory], key: str = "loss") -> MethodFactory:
    """The method that a setting names, for `run_images`.

    Args:
        methods: by name.
        key: the setting.
    """

    def make(settings: Settings, task: ImageTask) -> Regularizer | None:
        name = str(settings[key])
        if name not in methods:
            raise ValueError(f"{key} must be one of {list(methods)}, got {name!r}")
        return methods[name](settings, task)

    return make


def run_images(trial: Trial, make_method: MethodFactory) -> TrialResult:
    """Train and measure one network with one method.

    Args:
        trial: see `ImageTask` and `Recipe`.
        make_method: e.g. `chosen(METHODS)`.
    """
    with checkpoints(trial) as place:
        task = ImageTask(trial)
        method = make_method(trial.settings, task)
        trained = task.train(task.network(), Recipe.read(trial.settings), method, checkpoint=place("network"))
        return task.result(*trained)


def prepare(protocol: Protocol) -> None:
    """Look for the data of all arms before any of them trains; what a published `Study` gives as its `prepare`."""
    require_data(arm.fixed for arm in protocol.arms.values())


def require_data(arms: Iterable[Settings]) -> None:
    """Look for the data of all arms before any of them trains.

    Args:
        arms: settings of each.

    Raises:
        DatasetNotInstalled: saying what is missing and where it was looked for.
    """
    for name in dict.fromkeys(str(settings["dataset"]) for settings in arms):
        cifar_folder(name)


def choose_device(trial: Trial) -> torch.device:
    """CUDA where there is one, else the CPU; trials spread over several devices, each always on the same one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(trial.key[:8], 16) % torch.cuda.device_count())


@contextmanager
def checkpoints(trial: Trial) -> Iterator[Callable[[str], Path]]:
    """Files for the parts of a long trial, by name: they outlive a kill, and go once the trial is done.

    A trial is done with its result, and with its divergence, which would come again.
    """
    folder = Path(os.environ.get(CHECKPOINTS) or Path("wellposed-report") / "checkpoints") / trial.key[:16]
    try:
        yield lambda part: folder / f"{part}.pt"
    except DivergenceError:
        _remove(folder)
        raise
    _remove(folder)


def _remove(folder: Path) -> None:
    for file in folder.glob("*.pt*"):  # a kill may have left half a file beside the whole one
        file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()

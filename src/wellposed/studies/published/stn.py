"""Self-tuning networks as published: CIFAR-10, an AlexNet, 15 hyperparameters (arXiv 1903.03088, section 5.2).

Dropout of the inputs, of five convolutional and of two fully connected layers; scaling of the inputs; jitter of hue,
contrast, saturation and brightness; number and length of cutout's holes. Beside the STN the Delta-STN, and the same
network with all of them at their first values.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...compose import Compose
from ...evaluation import predict
from ...features import Cutout
from ...fit import fit
from ...hyperparameter import Hyperparameter
from ...indexed_dataset import TensorLoader
from ...lab.study import Study
from ...lab.trial import Trial, TrialResult
from ...regularizer import Regularizer
from ...step import Step
from ...tuning import HyperDropout, HyperDropout2d, SelfTuner
from ..problems.cifar import noisy_images
from ..problems.image_transforms import Normalise
from ..training import accuracy
from .images import EpochRecord, checkpoints, choose_device, prepare

CONVOLUTIONS = (64, 192, 384, 256, 256)
POOLED = (0, 1, 4)
"""Convolutions that a pooling of 2x2 follows."""
HIDDEN = 4096
DROP_AFTER, SMALLEST_RATE = 60, 1e-5
GREY = (0.299, 0.587, 0.114)


def tuned(value: float, high: float, **options: Any) -> Hyperparameter:
    """A hyperparameter in (0, high) of which each example has its own."""
    return Hyperparameter(value, 0.0, high, per_example=True, **options)


def alexnet(width: float, classes: int, seed: int) -> nn.Sequential:
    """Five 3x3 convolutions and two hidden layers for images of 32x32, each with a tuned dropout rate.

    Args:
        width: factor on all widths.
        classes: outputs.
        seed: of the initialisation, which is torch's own.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [HyperDropout(tuned(0.05, 1.0))]
        fan_in = 3
        for number, channels in enumerate(CONVOLUTIONS):
            fan_out = max(1, round(channels * width))
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride=2 if number == 0 else 1, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if number in POOLED else []
            layers.append(HyperDropout2d(tuned(0.05, 0.9)))
            fan_in = fan_out
        hidden = max(1, round(HIDDEN * width))
        layers.append(nn.Flatten())
        for size in (fan_in * 4, hidden):
            layers += [nn.Linear(size, hidden), nn.ReLU(), HyperDropout(tuned(0.05, 0.9))]
        return nn.Sequential(*layers, nn.Linear(hidden, classes))


class InputScale(Regularizer):
    """Multiplies each example by a number drawn uniformly from [1 / (1 + c), 1 + c]."""

    def __init__(self, c: Hyperparameter) -> None:
        super().__init__()
        self.c = c

    def on_batch(self, step: Step) -> None:
        c = self.c().expand(len(step.inputs))
        low = 1.0 / (1.0 + c)
        step.inputs = step.inputs * _as_images(low + (1.0 + c - low) * _uniform(step, 0.0, 1.0))


class ColourJitter(Regularizer):
    """Random hue, contrast, saturation and brightness of RGB images in [0, 1], one strength each.

    Contrast, saturation and brightness blend with the mean grey, the grey image and black by a factor from
    [max(0, 1 - s), 1 + s]; hue turns the colours by up to s of a full circle, around the axis of grey.
    """

    def __init__(self, **strengths: Hyperparameter) -> None:
        super().__init__()
        self.strengths = nn.ModuleDict(strengths)

    def on_batch(self, step: Step) -> None:
        x: Tensor = step.inputs
        grey = torch.tensor(GREY, device=x.device, dtype=x.dtype)[:, None, None]

        def factor(name: str) -> Tensor:
            strength = self.strengths[name]().expand(len(x))
            low = (1.0 - strength).clamp(min=0.0)
            return _as_images(low + (1.0 + strength - low) * _uniform(step, 0.0, 1.0))

        x = _turned(x, 2 * math.pi * self.strengths["hue"]().expand(len(x)) * _uniform(step, -1.0, 1.0))
        luma = (x * grey).sum(1, keepdim=True)
        x = torch.lerp(luma.mean((2, 3), keepdim=True), x, factor("contrast"))
        x = torch.lerp((x * grey).sum(1, keepdim=True), x, factor("saturation"))
        step.inputs = (x * factor("brightness")).clamp(0.0, 1.0)


class FromBytes(Regularizer):
    """Bytes to floats in [0, 1]; the first of the methods on the inputs."""

    def on_batch(self, step: Step) -> None:
        step.inputs = step.inputs.float() / 255.0


class Normalised(Regularizer):
    """What validation and test images went through; the last of the methods on the inputs."""

    def __init__(self, normalise: Normalise) -> None:
        super().__init__()
        self.normalise = normalise

    def on_batch(self, step: Step) -> None:
        assert step.generator is not None
        step.inputs = self.normalise(step.inputs * 255.0, step.generator)


class DropOnPlateau(Regularizer):
    """A tenth of the learning rate after each epoch that is worse than all but the last 60; stops below 1e-5.

    As the authors' code has it: once true, the condition mostly stays true.
    """

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_epoch(self, step: Step) -> None:
        if step.epoch == 0 or step.finished:
            return
        self.losses.append(step.validate()["loss"])
        earlier = self.losses[: -DROP_AFTER - 1]
        if earlier and self.losses[-1] > min(earlier) and step.optimizer is not None:
            for group in step.optimizer.param_groups:
                group["lr"] *= 0.1
            if step.optimizer.param_groups[0]["lr"] < SMALLEST_RATE:
                step.stop("the learning rate is spent")

    def get_extra_state(self) -> dict[str, Any]:
        """What an exact resume needs."""
        return {"losses": self.losses}

    def set_extra_state(self, state: Any) -> None:
        """Continue from `get_extra_state`."""
        self.losses = state["losses"]


def run(trial: Trial) -> TrialResult:
    """Train and measure one arm: "plain", "stn" or "delta_stn"."""
    settings, seed = trial.settings, trial.seed
    device = choose_device(trial)
    data = noisy_images(str(settings["dataset"]), seed, held_out=float(settings["held_out"]))
    normalise = Normalise(data.train.to(device))

    def loader(images: Tensor, labels: Tensor, transform: Any = normalise, **options: Any) -> TensorLoader:
        return TensorLoader(images.to(device), labels.to(device), transform=transform, seed=seed, **options)

    size = int(settings["batch_size"])
    test = loader(data.test, data.test_labels, batch_size=1000)
    record = EpochRecord(test if trial.phase == "evaluate" else None)
    colours = {
        name: tuned(0.05, high)
        for name, high in (("hue", 0.5), ("contrast", 1.0), ("saturation", 1.0), ("brightness", 1.0))
    }
    method = Compose(
        FromBytes(),
        ColourJitter(**colours),
        Cutout(tuned(1.0, 4.0, discrete=True), tuned(4.0, 24.0, discrete=True)),
        Normalised(normalise),
        InputScale(tuned(0.05, 0.3)),
        DropOnPlateau(),
        record,
    )
    name = str(settings["method"])
    optimizer = partial(torch.optim.SGD, lr=float(settings["learning_rate"]), momentum=0.9)
    with checkpoints(trial) as place:
        result = fit(
            alexnet(float(settings.get("width", 1.0)), data.classes, seed),
            loader(data.train, data.labels, None, batch_size=size, shuffle=True),
            epochs=int(settings["epochs"]),
            regularizer=method,
            validation=loader(data.validation, data.validation_labels, batch_size=size, shuffle=True),
            early_stopping=int(settings["patience"]),
            optimizer=optimizer if name == "plain" else None,
            tuner=None if name == "plain" else tuner_of(name, optimizer, settings, math.ceil(len(data.labels) / size)),
            device=device,
            seed=seed,
            checkpoint=place("network"),
        )
    metrics = {**record.metrics(), "validation": min(entry["validation_loss"] for entry in result.history)}
    if trial.phase == "evaluate":
        logits, labels = predict(result.model, test)
        metrics |= {"nll": float(F.cross_entropy(logits, labels)), "accuracy": accuracy(logits, labels)}
        metrics["error"] = 100.0 - metrics["accuracy"]
    return TrialResult(metrics, record.curves)


def tuner_of(name: str, weights: Any, settings: Any, batches: int) -> partial[SelfTuner]:
    """The tuner of an arm; its warm-up is counted in epochs."""
    make = {"stn": torch.optim.Adam, "delta_stn": torch.optim.RMSprop}[name]
    return partial(
        SelfTuner,
        weight_optimizer=weights,
        hyper_optimizer=partial(make, lr=float(settings["hyper_lr"])),
        scale=float(settings["scale"]),
        tau=float(settings["tau"]),
        train_steps=int(settings["train_steps"]),
        warmup_steps=int(settings["warmup_epochs"]) * batches,
        delta=name == "delta_stn",
    )


def _uniform(step: Step, low: float, high: float) -> Tensor:
    """One number for each example from [low, high)."""
    x = step.inputs
    return (low + (high - low) * torch.rand(len(x), generator=step.generator)).to(x)


def _as_images(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    """Colours turned by an angle around the axis of grey (Rodrigues' formula around (1, 1, 1) / sqrt 3)."""
    cos, sin = _as_images(angle.cos()), _as_images(angle.sin())
    around = (x.roll(1, 1) - x.roll(-1, 1)) / math.sqrt(3.0)
    return x * cos + around * sin + x.mean(1, keepdim=True) * (1.0 - cos)


STUDY = Study(slug="stn", run=run, estimands={}, headline=("nll", "test cross-entropy, nats"), prepare=prepare)

"""Learning-rate schedulers of a LightningModule under manual optimization, where Lightning leaves them alone."""

from __future__ import annotations

import warnings
from typing import Any, Literal


def step_schedulers(
    trainer: Any, module: Any, interval: Literal["step", "epoch"], done: int, *, on_plateau: bool = False
) -> None:
    """Step the schedulers that are due, by interval and frequency, as automatic optimization would.

    Args:
        trainer, module: of Lightning.
        interval: which of them: those of each optimizer step, or of each epoch.
        done: steps in this epoch, or epochs, that are done.
        on_plateau: those that read a metric (`ReduceLROnPlateau`), or the others.

    Raises:
        ValueError: for a metric that was never logged, where the module is strict about it.
    """
    for config in trainer.lr_scheduler_configs:
        if config.interval != interval or config.reduce_on_plateau != on_plateau or done % config.frequency:
            continue
        value = trainer.callback_metrics.get(config.monitor) if on_plateau else None
        if on_plateau and value is None:
            message = (
                f"RegularizerCallback: a scheduler of {type(module).__name__} monitors {config.monitor!r}, which was not "
                f"logged; logged are {sorted(trainer.callback_metrics)}"
            )
            if config.strict:
                raise ValueError(message)
            warnings.warn(message)
            continue
        with warnings.catch_warnings():
            # A first step that a gradient scaler skips is its business, not a wrong order of calls.
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
            module.lr_scheduler_step(config.scheduler, value)

"""`LightningRun`: one call of `trainer.fit` under a method, from the first step to the last."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..accumulation import Accumulation
from ..batching import Batch, as_batch, to_device
from ..evaluation import Metric, evaluate
from ..loading import set_epoch
from ..objective import Criterion
from ..parameters import clip_gradients
from ..regularizer import Regularizer, check_requirements
from ..step import DivergenceError, LoopServices, Step
from .lightning_checks import OWNER
from .lightning_schedulers import step_schedulers


@dataclass
class RunOptions:
    """What a user chose; see `RegularizerCallback`."""

    regularizer: Regularizer
    criterion: Criterion
    accumulation: int
    clip_norm: float | None
    path: str | None
    prepare: Callable[[Any], Any] | None
    validation: Iterable[Any] | None
    metrics: dict[str, Metric]
    seed: int


class LightningRun:
    """The training step, the epochs and the services of one run.

    Args:
        trainer, module: of Lightning.
        options: what the user chose.

    Attributes:
        network: as `attach` returned it; set before the optimizer is built.
        stopped: why a method ended training, or None.
    """

    def __init__(self, trainer: Any, module: Any, options: RunOptions) -> None:
        self.trainer, self.module, self.options = trainer, module, options
        self.regularizer = options.regularizer
        self.generator = torch.Generator().manual_seed(options.seed)
        self.network: nn.Module = module
        self.stopped: str | None = None
        self._validated: tuple[int, dict[str, float]] | None = None
        self._measured: Iterable[Any] | None = None
        self._epochs = self._total = 1
        self._batch: Accumulation | None = None
        self._skipped = False
        self._losses: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        """Where the network trains."""
        return self.trainer.strategy.root_device

    @property
    def loader(self) -> Any:
        """The Trainer's training loader; None before the start of training."""
        return self.trainer.train_dataloader

    @property
    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    # ── epochs ────────────────────────────────────────────────────────────────────────────────────────────────────
    def begin(self) -> None:
        """Read the loaders and the planned length, which are known from the start of training on.

        Raises:
            ValueError: for a training loader without a length, for several of them without `prepare`, or for several
                validation loaders where one is needed.
        """
        batches = self.trainer.num_training_batches
        if batches == math.inf:
            raise ValueError(
                f"{OWNER}: the training loader has no length, and schedules need one; set Trainer(limit_train_batches=...)"
            )
        self._total = int(self.trainer.estimated_stepping_batches)
        self._epochs = max(1, math.ceil(self._total / max(1, batches)))
        if isinstance(self.loader, (list, tuple, dict)) and self.options.prepare is None:
            raise ValueError(
                f"{OWNER}: {len(self.loader)} training loaders yield batches that only their user can read; pass prepare=, "
                "which makes (inputs, targets) of what they yield"
            )
        self._measured = self._validation_loader()

    def start_epoch(self) -> None:
        """Run the method's `on_epoch` before an epoch."""
        set_epoch(self.loader, self.trainer.current_epoch)
        self._losses = []
        self.regularizer.on_epoch(self._step())

    def end_batch(self, number: int) -> None:
        """Step the schedulers that read a metric in every step."""
        step_schedulers(self.trainer, self.module, "step", number + 1, on_plateau=True)

    def end_epoch(self) -> None:
        """Check the epoch's loss, and step the schedulers that read a metric.

        Raises:
            DivergenceError: if the mean loss is not finite.
        """
        if not self._losses:  # a method stopped, or a resumed run closes an epoch that was trained before
            return
        mean, epoch = float(torch.stack(self._losses).mean()), self.trainer.current_epoch + 1
        if not mean - mean == 0.0:  # neither inf nor nan
            raise DivergenceError(f"{OWNER}: the training loss of epoch {epoch} is {mean}; lower the learning rate")
        step_schedulers(self.trainer, self.module, "epoch", epoch, on_plateau=True)

    def close(self) -> None:
        """Run the method's closing `on_epoch`."""
        self.regularizer.on_epoch(self._step(finished=True))

    # ── one training step ─────────────────────────────────────────────────────────────────────────────────────────
    def train_step(self, sample: Any, number: int) -> Tensor:
        """What `fit` does with one batch, in the place of the module's `training_step`."""
        trainer, module = self.trainer, self.module
        # The precision plugin has entered its autocast for all of this; here, as in `fit`, it belongs to forward passes.
        with torch.autocast(self.device.type, enabled=False):
            loss = self._optimize(self._step(self._read(sample)))
        self._losses.append(loss)
        if not trainer.barebones:
            module.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=1, sync_dist=True)
        step_schedulers(trainer, module, "step", number + 1)
        if trainer.is_last_batch or number + 1 == trainer.num_training_batches:
            step_schedulers(trainer, module, "epoch", trainer.current_epoch + 1)
        return loss

    def _optimize(self, pool: Step) -> Tensor:
        scaler, wrapped = self._scaler, self.trainer.strategy.model
        self.trainer.optimizers[0].zero_grad(set_to_none=True)
        self.regularizer.on_batch(pool)
        self._batch = Accumulation(
            pool,
            self.regularizer,
            self.options.criterion,
            self.options.accumulation,
            backward=self.module.manual_backward,
            unscale=None if scaler is None else lambda: 1.0 / float(scaler.get_scale()),
            synchronize=wrapped.no_sync if isinstance(wrapped, DistributedDataParallel) else nullcontext,
        )
        loss = self._batch.run()
        self.module.optimizers().step()  # by way of `before_optimizer_step`
        self._batch = None
        if not self._skipped:
            self.regularizer.on_step(pool)
        return torch.zeros_like(loss) if self._skipped else loss

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Run `on_gradients` and clip: all precision plugins have this moment between unscaling and stepping."""
        if self._batch is None:
            return
        if self._scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            self._scaler.unscale_(optimizer)  # the plugin leaves it to fused optimizers
        if not self._will_skip(optimizer):
            self._batch.on_gradients()
        if self.options.clip_norm is not None:
            clip_gradients(self.network, self.options.clip_norm)
        self._skipped = self._will_skip(optimizer)

    def _will_skip(self, optimizer: Optimizer) -> bool:
        if self._scaler is None:
            return False
        found = self._scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        return any(bool(value) for value in found.values())

    # ── what hooks see ────────────────────────────────────────────────────────────────────────────────────────────
    def _step(self, batch: Batch | None = None, finished: bool = False) -> Step:
        trainer = self.trainer
        kind = _ParallelStep if isinstance(trainer.strategy.model, DistributedDataParallel) else Step
        step = kind(
            self.network,
            trainer.optimizers[0],
            epoch=self._epochs if finished else trainer.current_epoch,
            epochs=self._epochs,
            number=trainer.global_step,
            total=self._total,
            generator=self.generator,
            validation=self._measured,
            services=LoopServices(
                # Lightning takes no numbers at the end of training.
                log=_nowhere if finished or trainer.barebones else self._log,
                validate=None if self._measured is None else self._validate,
                stop=self._stop,
                invalidate=self._invalidate,
                autocast=trainer.precision_plugin.forward_context,
            ),
        )
        if batch is not None:
            step.inputs, step.targets, step.index = batch.inputs, batch.targets, batch.index
            step.weights, step.extra = batch.weights, dict(batch.extra)
        return step

    def _read(self, sample: Any) -> Batch:
        prepare = self.options.prepare
        batch = as_batch(to_device(sample if prepare is None else prepare(sample), self.device))
        if batch.index is None:
            provides = {"closure", "gradients", "optimizer", "double_backward", "validation"}
            check_requirements(self.regularizer, provides, f"{OWNER}, with a loader that yields no index,")
        return batch

    def _log(self, name: str, value: Any) -> None:
        self.module.log(name, value, on_step=False, on_epoch=True, batch_size=1)

    def _stop(self, reason: str) -> None:
        self.stopped = reason
        self.trainer.should_stop = True

    def _invalidate(self) -> None:
        self._validated = None

    def _validate(self) -> dict[str, float]:
        assert self._measured is not None
        number = self.trainer.global_step
        if self._validated is None or self._validated[0] != number:
            found = evaluate(self.network, self._measured, self.options.criterion, self.options.metrics)
            # Under data parallelism each process measures its share, and all must decide alike.
            values = torch.tensor(list(found.values()), device=self.device)
            mean = self.trainer.strategy.reduce(values, reduce_op="mean").tolist()
            self._validated = (number, found if self.trainer.world_size == 1 else dict(zip(found, mean, strict=True)))
        return self._validated[1]

    def _validation_loader(self) -> Iterable[Any] | None:
        trainer, loader = self.trainer, self.options.validation
        if loader is None and trainer.enable_validation:
            if trainer.val_dataloaders is None:  # Lightning loads them only before it validates by itself
                trainer.validating = True
                trainer.fit_loop.epoch_loop.val_loop.setup_data()
                trainer.training = True
            loader = trainer.val_dataloaders
            if isinstance(loader, (list, tuple)) and len(loader) == 1:
                loader = loader[0]
            if isinstance(loader, (list, tuple, dict)):
                if "validation" in self.regularizer.requires:
                    raise ValueError(
                        f"{OWNER}: the Trainer has {len(loader)} validation loaders; name the one on which methods "
                        "measure by validation="
                    )
                return None
        prepare = self.options.prepare
        return loader if loader is None or prepare is None else _Prepared(loader, prepare)


class _ParallelStep(Step):
    """A step whose network lies inside of the module that DistributedDataParallel wraps."""

    def replace_parameters(self, names: Any) -> None:
        raise RuntimeError(
            "replace_parameters: cannot change which parameters train under DistributedDataParallel: it reduces only the "
            "tensors that were trainable when it wrapped the module; choose them in attach, or train on one device"
        )


class _Prepared:
    """A loader whose batches are read by `prepare`."""

    def __init__(self, loader: Iterable[Any], prepare: Callable[[Any], Any]) -> None:
        self.loader, self.prepare = loader, prepare

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return map(self.prepare, self.loader)


def _nowhere(name: str, value: Any) -> None:
    """Takes what nobody can log."""

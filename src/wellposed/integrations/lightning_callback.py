"""`RegularizerCallback`: any `Regularizer` in `lightning.Trainer`, whatever the LightningModule."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from ..checkpoint import CheckpointError
from ..evaluation import Metric
from ..loading import loader_state, restore_loader
from ..objective import Criterion, cross_entropy
from ..parameters import select_parameters, trainable_names
from ..regularizer import Regularizer, check_requirements, leaves
from .lightning_checks import OWNER, check_network, check_optimizer, check_trainer
from .lightning_groups import WishedGroups
from .lightning_overrides import Overrides, network_at, put_network, switch_optimization
from .lightning_random import random_states, restore_random_states
from .lightning_run import LightningRun, RunOptions

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:  # two packages hold one code base, and a Trainer wants the callbacks of its own
    _prefers_old_name = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
    try:
        if _prefers_old_name:
            from pytorch_lightning import Callback
        else:
            from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback


class RegularizerCallback(Callback):
    """Trains a LightningModule's network under a `Regularizer`; step for step what `wellposed.fit` does.

    The module keeps its data, `configure_optimizers`, schedulers and validation. The callback attaches the method before
    the optimizer is built, carries out the method's wishes about parameter groups, and drives the training step: it calls
    the network and `criterion` in the place of `training_step`, which Lightning still wants to see defined. After
    `trainer.fit` the module holds the finished, plain network.

    A checkpoint of Lightning holds the method's state too: `trainer.fit(module, ckpt_path=...)` continues bit for bit
    from one that was written after an epoch. Devices: one, or several by strategy "ddp".

    Args:
        regularizer: the method, or a `Compose` of several.
        criterion: unreduced task loss `(outputs, targets) -> (batch,) or (batch, length)`.
        accumulation: micro-batches into which each batch of the loader is cut; gradients do not depend on it.
        clip_norm: largest global gradient norm, applied after `on_gradients`; per network of a `Pair`.
        model: attribute of the module that holds the network, dotted where it lies deeper; None: the module itself, by
            its `forward`.
        prepare: turns what the loaders yield into what `fit` takes: `(inputs, targets)`, `(inputs, targets, index)` or a
            dict with these names. None: they yield it already.
        validation: loader on which methods measure; the Trainer's own by default.
        metrics: further metrics for methods by name, `(outputs, targets) -> number`.
        seed: of the method's random numbers.

    Raises:
        ValueError: before training, for a setting of Trainer or module that the callback cannot carry out: gradient
            clipping or accumulation by the Trainer, manual optimization, several optimizers, one that was built before
            the method was attached, a strategy that shards parameters.
        RequirementError: if the method requires what the loop does not provide: an index, validation data.
        DivergenceError: after an epoch whose training loss was not finite.
        CheckpointError: for a checkpoint of another run.

    Example:
        >>> import lightning, torch
        >>> from wellposed import IndexedDataset
        >>> from wellposed.losses import EarlyLearning
        >>> class Module(lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.model = torch.nn.Linear(3, 2)
        ...     def training_step(self, batch):
        ...         "The callback drives the step."
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> data = torch.utils.data.TensorDataset(torch.randn(32, 3), torch.arange(32) % 2)
        >>> loader = torch.utils.data.DataLoader(IndexedDataset(data), batch_size=16)
        >>> callback = RegularizerCallback(EarlyLearning(num_examples=32, num_classes=2))
        >>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", callbacks=[callback], **quiet)
        >>> trainer.fit(Module(), loader)
        >>> trainer.global_step, sorted(trainer.callback_metrics)
        (4, ['train_loss', 'train_loss_epoch', 'train_loss_step'])
    """

    def __init__(
        self,
        regularizer: Regularizer,
        criterion: Criterion = cross_entropy,
        *,
        accumulation: int = 1,
        clip_norm: float | None = None,
        model: str | None = "model",
        prepare: Callable[[Any], Any] | None = None,
        validation: Iterable[Any] | None = None,
        metrics: Mapping[str, Metric] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(regularizer, Regularizer):
            raise TypeError(f"{OWNER}: regularizer must be a Regularizer, got {type(regularizer).__name__}")
        if not isinstance(accumulation, int) or accumulation < 1:
            raise ValueError(f"{OWNER}: accumulation must be an integer >= 1, got {accumulation!r}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"{OWNER}: clip_norm must be > 0, got {clip_norm!r}")
        if regularizer.coupled and accumulation > 1:
            warnings.warn(
                f"{type(regularizer).__name__} couples the examples of a batch; with accumulation={accumulation} it sees "
                "each micro-batch by itself",
                stacklevel=2,
            )
        self.regularizer = regularizer
        self.options = RunOptions(
            regularizer, criterion, accumulation, clip_norm, model, prepare, validation, dict(metrics or {}), seed
        )
        self._run: LightningRun | None = None
        self._overrides: Overrides | None = None
        self._earlier: list[Tensor] = []
        self._loaded: dict[str, Any] | None = None
        self._unrestored: dict[str, Any] | None = None
        self._stopped: str | None = None

    @property
    def run(self) -> LightningRun:
        """The run that `trainer.fit` is in.

        Raises:
            RuntimeError: outside of `trainer.fit`.
        """
        if self._run is None:
            raise RuntimeError(f"{OWNER}: trainer.fit does not run")
        return self._run

    @property
    def stopped(self) -> str | None:
        """Why a method ended training before its last epoch, or None."""
        return self._stopped if self._run is None else self._run.stopped

    # ── before training ───────────────────────────────────────────────────────────────────────────────────────────
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        check_trainer(trainer, pl_module)
        provides, where = {"index", "closure", "gradients", "optimizer", "double_backward"}, OWNER
        if self.options.validation is not None or trainer.enable_validation:
            provides.add("validation")
        else:
            where += ", without a validation loader and a validation_step,"
        check_requirements(self.regularizer, provides, where)
        run = self._run = LightningRun(trainer, pl_module, self.options)
        overrides = self._overrides = Overrides(pl_module)
        configure_model, configure_optimizers = pl_module.configure_model, pl_module.configure_optimizers

        # Plain functions: a copy of the module (a teacher, an average) must not copy the callback with it.
        def attached_model() -> None:
            configure_model()
            self._attach(run)

        def wished_optimizer() -> Any:
            return self._configure(run, configure_optimizers)

        def training_step(batch: Any, batch_idx: int) -> Tensor:
            self._restore_random()
            return run.train_step(batch, batch_idx)

        overrides.set("configure_model", attached_model)
        overrides.set("configure_optimizers", wished_optimizer)
        overrides.set("training_step", training_step)

    def _attach(self, run: LightningRun) -> None:
        path, module = self.options.path, run.module
        network = check_network(network_at(module, path), path, module).to(run.device)
        self._earlier = list(module.parameters())
        # Moved before `attach` too, for methods that read the model's device there, and after it for their state.
        run.network = self.regularizer.to(run.device).attach(network).to(run.device)
        self.regularizer.to(run.device)
        if path is not None:
            put_network(module, path, run.network)
        elif run.network is not module:
            raise ValueError(
                f"{OWNER}: {type(self.regularizer).__name__} replaces the network by a {type(run.network).__name__}, "
                "which model=None cannot take: hold the network in an attribute, and name it by model="
            )

    def _configure(self, run: LightningRun, configure: Callable[[], Any]) -> Any:
        groups = WishedGroups(run.network, self.regularizer.parameter_groups(run.network))
        with groups.applied() as built:
            found = configure()
        optimizer = check_optimizer(found, groups, built, {id(p) for p in self._earlier}, run.module)
        self._earlier = []
        groups.adopt(optimizer)
        if self._loaded is not None:
            self._continue(run, self._loaded, optimizer)
            self._loaded = None
        return found

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Only now: under automatic optimization Lightning reads and checks what a module says of its schedulers.
        switch_optimization(trainer, pl_module, automatic=False)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.run.begin()

    # ── training ──────────────────────────────────────────────────────────────────────────────────────────────────
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self._restore_random():
            # Lightning drew the resumed epoch's order before the random state was restored; let it draw once more.
            trainer.fit_loop._resuming_from_checkpoint = False
        self.run.start_epoch()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        self.run.before_optimizer_step(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.run.end_batch(batch_idx)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.run.end_epoch()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.run.close()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        # After the last checkpoint: a finished network may have other parameters than the one that trained.
        finished = self.regularizer.finish(self.run.network)
        if self.options.path is not None:
            put_network(pl_module, self.options.path, finished)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._give_back(trainer, pl_module)
        self._stopped = self.stopped
        self._run = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._give_back(trainer, pl_module)  # the run stays: a checkpoint of the state at the exception may follow

    def _give_back(self, trainer: Any, module: Any) -> None:
        """Make the module what it was, but for its network."""
        if self._overrides is None:
            return
        self._overrides.restore()
        self._overrides = self._loaded = self._unrestored = None
        if not module.automatic_optimization:
            switch_optimization(trainer, module, automatic=True)

    # ── checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────
    def state_dict(self) -> dict[str, Any]:
        """What an exact continuation needs beside Lightning's own state; every process must call it."""
        run = self._run
        if run is None:
            return {}
        return {
            "methods": self._methods(),
            "regularizer": self.regularizer.state_dict(),
            "trainable": trainable_names(run.network),
            "generator": run.generator.get_state(),
            "loader": loader_state(run.loader),
            "random": random_states(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the optimizer is built: which parameters it holds is part of it."""
        self._loaded = state_dict

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._run is None:
            return
        if trainer.max_steps != -1:
            warnings.warn(
                f"{OWNER}: under max_steps, Lightning trains one batch more than planned where it resumes at the end of an "
                "epoch (its issue 19617); plan by max_epochs alone for an exact continuation"
            )
        if self.state_key not in checkpoint.get("callbacks", {}):
            raise CheckpointError(
                f"{OWNER}: the checkpoint holds no state of this callback: it was written without it, or after training "
                "had ended. Continue from one that ModelCheckpoint wrote during training, or load its weights before fit "
                "and pass no ckpt_path"
            )

    def _continue(self, run: LightningRun, state: dict[str, Any], optimizer: Optimizer) -> None:
        if state["methods"] != self._methods():
            raise CheckpointError(
                f"{OWNER}: the checkpoint belongs to a run under {state['methods']}, this one is under {self._methods()}"
            )
        if state["trainable"] != trainable_names(run.network):
            select_parameters(run.network, optimizer, state["trainable"])
        self.regularizer.load_state_dict(state["regularizer"])
        run.generator.set_state(state["generator"])
        self._unrestored = state

    def _restore_random(self) -> bool:
        """Continue from the random numbers of a checkpoint, at the first moment at which nobody else draws any."""
        if self._unrestored is None:
            return False
        restore_loader(self.run.loader, self._unrestored["loader"])
        restore_random_states(self._unrestored["random"])
        self._unrestored = None
        return True

    def _methods(self) -> list[str]:
        return [type(method).__name__ for method in leaves([self.regularizer])]

"""`RegularizerCallback` in lightning.Trainer takes the steps of `fit`, and Lightning's own where there is no method."""

import copy
import importlib
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from doubles import (
    Coreset,
    CoTeaching,
    HalfTraining,
    MixedGradient,
    SelfDistillation,
    data,
    flat,
    noisy_network,
    smooth_network,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from wellposed import Compose, IndexedDataset, Regularizer, TensorLoader, fit
from wellposed.checkpoint import CheckpointError
from wellposed.gradients import SharpnessAwareMinimization, SurrogateSharpness
from wellposed.hyperparameter import Hyperparameter
from wellposed.losses import EarlyLearning
from wellposed.regularizer import RequirementError
from wellposed.step import DivergenceError
from wellposed.tuning import SelfTuner
from wellposed.weights import EarlyStopping, WeightDecay

L = pytest.importorskip("lightning")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from wellposed.integrations.lightning_callback import RegularizerCallback  # noqa: E402
from wellposed.integrations.lightning_groups import WishedGroups  # noqa: E402

ROWS, CLASSES, BATCH = 64, 4, 16
QUIET = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "num_sanity_val_steps": 0,
}  # fmt: skip
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Module(L.LightningModule):
    """What a user has: a network, a training step of its own, an optimizer, perhaps a scheduler."""

    def __init__(self, network, optimizer=SGD, scheduler=None, **config):
        super().__init__()
        self.model = network
        self.make, self.scheduler, self.config = optimizer, scheduler, config

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), **self.config}}


class Record(Regularizer):
    """Keeps the weights after every step."""

    def __init__(self):
        super().__init__()
        self.path = []

    def on_step(self, step):
        self.path.append(flat(step.model).clone())


class Seeded(L.Callback):
    """`fit` seeds the global random numbers at its start."""

    def on_train_start(self, trainer, pl_module):
        torch.manual_seed(0)


def loader():
    return TensorLoader(*data(), batch_size=BATCH, shuffle=True)


def pairs():
    return DataLoader(TensorDataset(*data()), BATCH)


def shuffled(batch_size=BATCH):
    return DataLoader(IndexedDataset(TensorDataset(*data())), batch_size=batch_size, shuffle=True)


def train(module, batches, method, *, validation=None, trainer=(), fit_options=(), validation_loader=None, **options):
    callback = RegularizerCallback(method, validation=validation_loader, **options)
    settings = {"max_epochs": 2, **QUIET, **dict(trainer)}
    settings["callbacks"] = [Seeded(), callback, *settings.get("callbacks", [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = L.Trainer(**settings)
        found.fit(module, batches, validation, **dict(fit_options))
    return found, callback


def co_teaching():
    return CoTeaching(noisy_network(seed=1))


METHODS = {
    "table": (lambda: EarlyLearning(ROWS, CLASSES), 2),
    "closure": (lambda: SharpnessAwareMinimization(0.05), 2),
    "mixed gradient": (MixedGradient, 3),
    "batch and table": (lambda: SelfDistillation(ROWS, CLASSES), 2),
    "smaller batch": (lambda: Coreset(12), 2),
    "two networks": (co_teaching, 1),
    "changing parameters": (HalfTraining, 2),
    "IGNITE": (lambda: SurrogateSharpness(lam=0.5, eps=0.06, lam_lr=1.0, output_fn=lambda z: z[:, 0]), 2),
    "together": (lambda: Compose(EarlyLearning(ROWS, CLASSES), SelfDistillation(ROWS, CLASSES), MixedGradient()), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_equals_fit_step_for_step(name):
    make, parts = METHODS[name]
    network = smooth_network if name == "IGNITE" else noisy_network
    a, b = Record(), Record()
    first, second = make(), make()
    module = Module(network())
    trainer, _ = train(module, loader(), Compose(first, a), accumulation=parts, clip_norm=0.5)
    result = fit(
        network(), loader(), epochs=2, regularizer=Compose(second, b), optimizer=SGD, accumulation=parts, clip_norm=0.5
    )
    assert len(a.path) == len(b.path) == 2 * ROWS // BATCH
    for x, y in zip(a.path, b.path, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
    for x, y in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    for (key, x), y in zip(module.model.state_dict().items(), result.model.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6, msg=key)
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(result.history[-1]["loss"], abs=1e-5)
    for key in set(result.history[-1]) & {"surrogate_sharpness", "sharpness_multiplier"}:
        assert float(trainer.callback_metrics[key]) == pytest.approx(result.history[-1][key], rel=1e-4)
    assert (name == "IGNITE") == ("surrogate_sharpness" in trainer.callback_metrics)


def test_bfloat16_equals_fit():
    a, b = Record(), Record()
    methods = [Compose(EarlyLearning(ROWS, CLASSES), SharpnessAwareMinimization(0.05), r) for r in (a, b)]
    train(Module(noisy_network()), loader(), methods[0], accumulation=2, trainer={"precision": "bf16-mixed"})
    fit(noisy_network(), loader(), epochs=2, regularizer=methods[1], optimizer=SGD, accumulation=2, amp=torch.bfloat16)
    plain = Record()
    fit(noisy_network(), loader(), epochs=2, regularizer=Compose(*list(methods[1])[:2], plain), optimizer=SGD)
    torch.testing.assert_close(torch.stack(a.path), torch.stack(b.path), rtol=0, atol=1e-6)
    assert (torch.stack(a.path) - torch.stack(plain.path)).abs().max() > 1e-4


@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.AdamW, lr=0.01, fused=True)])
def test_gradient_scaler_skips_and_unscales_as_in_fit(optimizer):
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)

    a, b = Record(), Record()
    methods = [Compose(SharpnessAwareMinimization(0.05), r) for r in (a, b)]
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler())
    trainer, _ = train(
        Module(noisy_network(), optimizer), loader(), methods[0], clip_norm=1.0, trainer={"plugins": [plugin]}
    )
    fit(
        noisy_network(), loader(), epochs=2, regularizer=methods[1], optimizer=optimizer, amp=torch.float16,
        scaler=scaler(), clip_norm=1.0,
    )  # fmt: skip
    assert 0 < len(a.path) < 8 and trainer.global_step == 8  # some steps were skipped
    torch.testing.assert_close(torch.stack(a.path), torch.stack(b.path), rtol=0, atol=1e-6)


# ── against Lightning itself ──────────────────────────────────────────────────────────────────────────────────────────
SCHEDULERS = {
    "every step": (partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=40), {"interval": "step"}),
    "every second epoch": (partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.3), {"frequency": 2}),
    "plateau": (partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=1.0), {"monitor": "val_loss"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_without_a_method_it_is_lightning_schedulers_included(name):
    class Watch(L.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.seen.append(torch.cat([flat(pl_module), torch.tensor([trainer.optimizers[0].param_groups[0]["lr"]])]))

    scheduler, config = SCHEDULERS[name]
    validation = DataLoader(TensorDataset(*data()), 32)
    watched = []
    for with_callback in (False, True):
        torch.manual_seed(0)
        module, watch = Module(noisy_network(), scheduler=scheduler, **config), Watch()
        callbacks = [RegularizerCallback(Regularizer())] if with_callback else []
        trainer = L.Trainer(max_epochs=5, **QUIET, callbacks=[watch, *callbacks])
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, pairs(), validation)
        watched.append(torch.stack(watch.seen))
        assert trainer.global_step == 20
        assert float(trainer.callback_metrics["val_loss"]) > 0
    assert len(watched[0][:, -1].unique()) > 1
    torch.testing.assert_close(*watched, rtol=0, atol=1e-6)


# ── checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("validated, batches", [(False, shuffled), (True, shuffled), (False, loader)])
def test_continues_bit_for_bit_from_a_lightning_checkpoint(tmp_path, validated, batches):
    def run(number, **options):
        method = Compose(
            SelfDistillation(ROWS, CLASSES), MixedGradient(), HalfTraining(), EarlyStopping() if validated else Record()
        )
        torch.manual_seed(number)  # nothing may depend on the state at the start of the second run
        keep = ModelCheckpoint(tmp_path / str(number), filename="{epoch}", save_top_k=-1)
        module = Module(
            noisy_network(number), scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.7)
        )
        train(
            module, batches(), method, accumulation=2, validation=DataLoader(TensorDataset(*data()), 32) if validated else None,
            trainer={"max_epochs": 4, "enable_checkpointing": True, "callbacks": [keep]}, fit_options=options,
        )  # fmt: skip
        return [*module.model.state_dict().values(), method.regularizers[0].memory]

    whole = run(0)
    for weights_only in (True, False):
        resumed = run(1, ckpt_path=tmp_path / "0" / "epoch=1.ckpt", weights_only=weights_only)
        for a, b in zip(whole, resumed, strict=True):
            assert torch.equal(a, b)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    keep = {"enable_checkpointing": True, "max_epochs": 1}
    written = ModelCheckpoint(tmp_path, filename="own")
    train(Module(smooth_network()), loader(), Record(), trainer={**keep, "callbacks": [written]})
    with pytest.raises(CheckpointError, match=r"under \['Record'\], this one is under \['HalfTraining'\]"):
        train(Module(smooth_network()), loader(), HalfTraining(), fit_options={"ckpt_path": tmp_path / "own.ckpt"})
    trainer = L.Trainer(**QUIET, max_steps=8, callbacks=[RegularizerCallback(Record())])
    with pytest.warns(UserWarning, match="trains one batch more than planned"):
        trainer.fit(Module(smooth_network()), loader(), ckpt_path=tmp_path / "own.ckpt")
    trainer = L.Trainer(**QUIET, max_epochs=1)
    trainer.fit(Module(smooth_network()), pairs())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="holds no state of this callback"):
        train(Module(smooth_network()), loader(), Record(), fit_options={"ckpt_path": tmp_path / "plain.ckpt"})


# ── what hooks may do ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_method_measures_stops_and_restores_as_in_fit():
    held_out = DataLoader(TensorDataset(*data(32)), 16)
    module = Module(smooth_network(), partial(torch.optim.SGD, lr=3.0))
    first, second = EarlyStopping(patience=1), EarlyStopping(patience=1)
    trainer, callback = train(module, loader(), first, validation=held_out, trainer={"max_epochs": 12})
    result = fit(
        smooth_network(), loader(), epochs=12, regularizer=second, validation=held_out,
        optimizer=partial(torch.optim.SGD, lr=3.0),
    )  # fmt: skip
    assert callback.stopped == result.stopped is not None
    assert trainer.global_step == len(result.history) * ROWS // BATCH < 48
    assert (first.best_epoch, first.best_value) == (second.best_epoch, pytest.approx(second.best_value, abs=1e-6))
    torch.testing.assert_close(flat(module.model), flat(result.model), rtol=0, atol=1e-6)


def test_hooks_see_the_clock_of_fit():
    class Clock(Regularizer):
        def __init__(self):
            super().__init__()
            self.seen = []

        def note(self, hook, step):
            self.seen.append((hook, step.epoch, step.epochs, step.number, step.total, step.finished, step.progress))

        def on_batch(self, step):
            self.note("batch", step)

        def on_step(self, step):
            self.note("step", step)

        def on_epoch(self, step):
            self.note("epoch", step)
            step.log("clock", step.number)

        def finish(self, model):
            self.seen.append("finish")
            return model

    a, b = Clock(), Clock()
    train(Module(smooth_network()), loader(), a)
    fit(smooth_network(), loader(), epochs=2, regularizer=b)
    assert a.seen == b.seen
    c = Clock()
    train(Module(smooth_network()), loader(), c, trainer={"max_epochs": -1, "max_steps": 6})
    assert c.seen[-2] == ("epoch", 2, 2, 6, 6, True, 1.0)


class Wishing(Regularizer):
    """Adds a parameter that it owns, and wishes for groups."""

    def attach(self, model):
        model.extra = nn.Parameter(torch.ones(1))
        return model

    def parameter_groups(self, model):
        return [
            {"names": ["0.bias", "2.bias"], "weight_decay": 0.0, "lr_factor": 0.1},
            {"names": ["extra"], "owned": True},
        ]


def test_wishes_about_groups_are_carried_out_in_the_users_optimizer():
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.3)
    a, b = Record(), Record()
    half = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda n: 0.5**n)
    trainer, _ = train(Module(smooth_network(), optimizer, half, interval="step"), loader(), Compose(Wishing(), a))
    fit(
        smooth_network(), loader(), epochs=2, regularizer=Compose(Wishing(), b), optimizer=optimizer,
        scheduler=lambda o, _: half(o),
    )  # fmt: skip
    torch.testing.assert_close(torch.stack(a.path), torch.stack(b.path), rtol=0, atol=1e-6)
    groups = trainer.optimizers[0].param_groups
    assert [g["names"] for g in groups] == [["0.weight", "2.weight"], ["0.bias", "2.bias"]]
    assert [g["initial_lr"] for g in groups] == [0.1, pytest.approx(0.01)]
    assert torch.optim.Optimizer.add_param_group.__module__ == "torch.optim.optimizer"


def test_the_module_itself_may_be_the_network_and_batches_may_be_prepared():
    rows = [{"features": x, "label": y} for x, y in zip(*data(), strict=True)]
    a, b = (Compose(Record(), EarlyStopping()) for _ in range(2))
    train(
        Module(smooth_network()), DataLoader(rows, BATCH), a, model=None, prepare=lambda r: (r["features"], r["label"]),
        validation_loader=DataLoader(rows, BATCH),
    )  # fmt: skip
    fit(smooth_network(), pairs(), epochs=2, regularizer=b, validation=pairs(), optimizer=SGD)
    assert a.regularizers[1].best_value == pytest.approx(b.regularizers[1].best_value, abs=1e-6)
    a, b = a.regularizers[0], b.regularizers[0]
    torch.testing.assert_close(torch.stack(a.path), torch.stack(b.path), rtol=0, atol=1e-6)


def test_a_method_may_copy_the_module_that_is_the_network():
    class Teacher(Regularizer):
        def on_batch(self, step):
            teacher = copy.deepcopy(step.model)
            assert teacher._trainer is None
            torch.testing.assert_close(step.forward(model=teacher, training=False), step.forward(training=False))

    trainer, _ = train(Module(noisy_network()), loader(), Teacher(), model=None)
    assert trainer.global_step == 8


def test_groups_take_all_that_an_optimizer_takes_and_keep_a_home_for_frozen_parameters():
    network = smooth_network()
    network[0].bias.requires_grad_(False)
    groups = WishedGroups(network, [{"names": ["0.bias", "2.bias"], "weight_decay": 0.0}])
    stranger = nn.Parameter(torch.ones(1))
    with groups.applied() as built:
        own = {"params": network[2].parameters(), "weight_decay": 0.2}
        optimizer = torch.optim.SGD([{"params": network[0].weight}, own, {"params": [stranger]}], lr=0.1)
        named = torch.optim.SGD(network.named_parameters(), lr=0.1, weight_decay=0.2)
    groups.adopt(optimizer)
    found = [(g["names"], len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(["0.weight"], 1, 0), (["2.weight"], 1, 0.2), (["2.bias", "0.bias"], 1, 0.0), ([], 1, 0)]
    assert [(g["names"], g["weight_decay"]) for g in named.param_groups] == [
        (["0.weight", "2.weight"], 0.2), (["0.bias", "2.bias"], 0.0)
    ]  # fmt: skip
    assert built == [optimizer, named]


def test_a_module_that_builds_its_network_late():
    class Late(Module):
        def __init__(self):
            super().__init__(None)

        def configure_model(self):
            if self.model is None:
                self.model = noisy_network()

    record = Record()
    train(Late(), loader(), Compose(HalfTraining(), record))
    assert len(record.path) == 8


def test_the_module_is_given_back_and_trains_without_the_callback():
    module = Module(smooth_network())
    trainer, callback = train(module, loader(), SharpnessAwareMinimization(0.05))
    assert module.automatic_optimization and trainer.global_step == 8
    assert {"training_step", "configure_model", "configure_optimizers"}.isdisjoint(vars(module))
    start = flat(module).clone()
    L.Trainer(max_epochs=1, **QUIET).fit(module, pairs())
    assert not torch.equal(start, flat(module))
    with pytest.raises(RuntimeError, match=r"trainer\.fit does not run"):
        _ = callback.run
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader())  # goes on from the step where it stood
    assert trainer.global_step == 12


def test_an_error_gives_the_module_back_too_and_the_checkpoint_of_it_holds_the_state(tmp_path):
    class Fails(Regularizer):
        def on_step(self, step):
            if step.number == 6:
                raise KeyError("as planned")

    module, table = Module(smooth_network()), EarlyLearning(ROWS, CLASSES)
    keep = ModelCheckpoint(tmp_path, filename="failed", save_on_exception=True)
    with pytest.raises(KeyError, match="as planned"):
        train(
            module, loader(), Compose(table, Fails()), trainer={"enable_checkpointing": True, "callbacks": [keep]}
        )  # fmt: skip
    state = torch.load(tmp_path / "failed.ckpt", weights_only=True)
    assert state["global_step"] == 7  # the failed step counts: its optimizer had stepped
    found = state["callbacks"]["RegularizerCallback"]["regularizer"]
    assert any(torch.equal(value, table.table.rows) for value in found.values() if isinstance(value, torch.Tensor))
    assert module.automatic_optimization and "training_step" not in vars(module)
    with pytest.raises(DivergenceError, match="training loss of epoch 1 is"):
        train(Module(smooth_network(), partial(torch.optim.SGD, lr=1e38)), loader(), Regularizer())


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────
class Manual(Module):
    def __init__(self, network):
        super().__init__(network)
        self.automatic_optimization = False


class Two(Module):
    def configure_optimizers(self):
        return [SGD(self.model[0].parameters()), SGD(self.model[2].parameters())]


class NoOptimizer(Module):
    def configure_optimizers(self):
        return None


class Early(Module):
    def __init__(self, network):
        super().__init__(network)
        self.optimizer = SGD(self.parameters())

    def configure_optimizers(self):
        return self.optimizer


class WithHead(Module):
    def __init__(self, network):
        super().__init__(network)
        self.head = nn.Linear(2, 2)


class OwnClipping(Module):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        return None


class OwnStep(Module):
    def optimizer_step(self, *args, **kwargs):
        return super().optimizer_step(*args, **kwargs)


class Replaces(Regularizer):
    def attach(self, model):
        return nn.Sequential(model)


REFUSED = {
    "accumulation by the Trainer": (Module, Record, {"accumulate_grad_batches": 4}, {}, r"accumulate_grad_batches=4.*accumulation=4"),
    "clipping by the Trainer": (Module, Record, {"gradient_clip_val": 0.5}, {}, r"gradient_clip_val=0.5.*clip_norm=0.5"),
    "manual optimization": (Manual, Record, {}, {}, "Manual uses manual optimization"),
    "two optimizers": (Two, Record, {}, {}, "returned 2 optimizers"),
    "no optimizer": (NoOptimizer, Record, {}, {}, "returned no optimizer"),
    "optimizer before groups": (Early, Wishing, {}, {}, "asks for its own parameter groups; build the optimizer inside"),
    "optimizer before attach": (Early, lambda: WishingToTrain(), {}, {}, "added the parameter 'extra'"),
    "parameters outside": (WithHead, Record, {}, {}, "'head.weight', which is no part of the network"),
    "own clipping": (OwnClipping, Record, {}, {}, "OwnClipping.configure_gradient_clipping would not be called"),
    "own step": (OwnStep, Record, {}, {}, "OwnStep.optimizer_step would not be called"),
    "no end": (Module, Record, {"max_epochs": -1}, {}, "planned length"),
    "wrong attribute": (Module, Record, {}, {"model": "network"}, "model='network' must name an attribute of Module"),
    "no network": (Module, Record, {}, {"model": "make"}, "found partial"),
    "replaced module": (Module, Replaces, {}, {"model": None}, "Replaces replaces the network by a Sequential"),
}  # fmt: skip


class WishingToTrain(Regularizer):
    """Adds a parameter for the user's optimizer."""

    attach = Wishing.attach


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_before_anything_trains(name):
    kind, method, settings, options, words = REFUSED[name]
    module = kind(smooth_network())
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    with pytest.raises(ValueError, match=words):
        train(module, loader(), method(), trainer=settings, **options)
    assert all(torch.equal(p, start[name]) for name, p in module.named_parameters() if name in start)
    assert "training_step" not in vars(module)


def test_requirements_are_checked_before_anything_trains():
    module = Module(smooth_network())
    start = flat(module).clone()
    with pytest.raises(RequirementError, match="EarlyLearning requires 'index'.*a loader that yields no index"):
        train(module, pairs(), EarlyLearning(ROWS, CLASSES))
    with pytest.raises(RequirementError, match="EarlyStopping requires 'validation'.*without a validation loader"):
        train(module, loader(), EarlyStopping())
    with pytest.raises(ValueError, match="2 validation loaders; name the one"):
        train(module, loader(), EarlyStopping(), validation=[pairs(), pairs()])
    with pytest.raises(ValueError, match="limit_train_batches"):
        train(module, iter_only(), Record())
    with pytest.raises(ValueError, match="2 training loaders yield batches"):
        train(module, [pairs(), pairs()], Record())
    assert torch.equal(start, flat(module))


def iter_only():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(pairs())

    return DataLoader(Endless(), batch_size=None)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"regularizer": nn.Linear(1, 1)}, TypeError, "regularizer must be a Regularizer, got Linear"),
        ({"accumulation": 0}, ValueError, "accumulation must be an integer >= 1, got 0"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm must be > 0, got 0.0"),
    ],
)
def test_bad_arguments(options, error, words):
    with pytest.raises(error, match=words):
        RegularizerCallback(**{"regularizer": Regularizer(), **options})
    with pytest.warns(UserWarning, match="couples the examples"):
        RegularizerCallback(CoTeaching(None), accumulation=2)


# ── the package under its old name ────────────────────────────────────────────────────────────────────────────────────
def test_pytorch_lightning_is_taken_where_it_is_what_the_user_has(monkeypatch):
    pl = pytest.importorskip("pytorch_lightning")
    name = "wellposed.integrations.lightning_callback"
    for hidden in ("lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, hidden, None)
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    module.__package__ = "wellposed.integrations"
    spec.loader.exec_module(module)
    assert issubclass(module.RegularizerCallback, pl.Callback)

    class Old(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = smooth_network()

        def training_step(self, batch):
            raise AssertionError("the callback drives the step")

        def configure_optimizers(self):
            return SGD(self.parameters())

    a, b = Record(), Record()
    callback = module.RegularizerCallback(Compose(SharpnessAwareMinimization(0.05), a))
    pl.Trainer(max_epochs=2, **QUIET, callbacks=[callback]).fit(Old(), loader())
    fit(smooth_network(), loader(), epochs=2, regularizer=Compose(SharpnessAwareMinimization(0.05), b), optimizer=SGD)
    torch.testing.assert_close(torch.stack(a.path), torch.stack(b.path), rtol=0, atol=1e-6)


# ── tuners ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def snippet(heading, name="hyperparameters"):
    """The code under a heading of a page."""
    page = (Path(__file__).parents[2] / "docs" / f"{name}.md").read_text()
    return page.split(f"## {heading}\n")[1].split("```python\n")[1].split("```")[0]


def test_the_page_about_integrations_runs():
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(snippet("Lightning", "integrations"), names)
    assert names["trainer"].global_step == 8 and "train_loss" in names["trainer"].callback_metrics


def test_the_page_learns_strengths_in_lightning():
    names = {
        "module": Module(smooth_network()), "train_loader": shuffled(), "validation_loader": shuffled(),
        "trainer_options": {**QUIET, "max_epochs": 2},
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(snippet("In Lightning or transformers"), names)
    schedule, strength = names["schedule"], names["strength"]
    values = [entry["strength"] for entry in schedule.values]
    assert len(set(values)) > 1 and names["trainer"].global_step == 8
    # What the last training step read, of the eight.
    assert float(strength.value) == pytest.approx(schedule.at(7 / 8)["strength"], rel=1e-5)


def test_the_page_learns_strengths_of_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, max_position_embeddings=8, bos_token_id=1, eos_token_id=2,
        attn_implementation="eager",  # linearised predictions need forward derivatives, which the fused kernels lack
    )  # fmt: skip
    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (16, 6), generator=torch.Generator().manual_seed(0))
    batches = [{"inputs": {"input_ids": part}, "targets": part} for part in tokens.split(4)]
    strength = Hyperparameter(1e-3, chart="exp")
    learned = fit(
        transformers.LlamaForCausalLM(config), batches, validation=batches, epochs=3,
        regularizer=WeightDecay(strength), tuner=partial(SelfTuner, strict=False),
    )  # fmt: skip
    assert type(learned.model) is transformers.LlamaForCausalLM
    assert float(strength.value) != pytest.approx(1e-3, rel=1e-3)

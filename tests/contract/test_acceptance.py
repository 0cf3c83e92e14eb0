"""The acceptance tests of the contract: awkward methods in one loop, without a special case."""

import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from doubles import (
    Coreset,
    CoTeaching,
    HalfTraining,
    MeanGradientNorm,
    MixedGradient,
    RecordedError,
    SelfDistillation,
    data,
    flat,
    noisy_network,
    smooth_network,
)
from torch import nn

from wellposed import (
    Compose,
    DivergenceError,
    Pair,
    Regularizer,
    RequirementError,
    Step,
    TensorLoader,
    cross_entropy,
    fit,
)
from wellposed.accumulation import Accumulation
from wellposed.checkpoint import save_atomically
from wellposed.gradients import SharpnessAwareMinimization
from wellposed.losses import EarlyLearning
from wellposed.regularizer import check_requirements
from wellposed.weights import EarlyStopping, WeightAveraging

X, Y = data()
SGD = partial(torch.optim.SGD, lr=0.1)


def loader(batch_size=16, seed=3):
    return TensorLoader(X, Y, batch_size=batch_size, shuffle=True, seed=seed)


def train(model, regularizer=None, epochs=2, **options):
    return fit(model, loader(), epochs=epochs, regularizer=regularizer, **{"optimizer": SGD, **options}).model


class CountedEarlyLearning(EarlyLearning):
    writes = 0

    def on_backward(self, step):
        self.writes += 1
        super().on_backward(step)


def test_tables_are_written_once_a_step_although_the_closure_evaluates_again():
    method = CountedEarlyLearning(64, 4)
    train(noisy_network(), Compose(method, MixedGradient()))
    assert method.writes == 8


def test_a_second_pass_with_radius_zero_is_plain_training_bit_for_bit_with_dropout_and_batchnorm():
    twice, once = noisy_network(), noisy_network()
    train(twice, MixedGradient(rho=0.0))
    train(once)
    assert torch.equal(flat(twice), flat(once))
    for a, b in zip(twice.buffers(), once.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EarlyLearning(64, 4),
        lambda: Compose(EarlyLearning(64, 4), MixedGradient()),
        lambda: Compose(SelfDistillation(64, 4), EarlyLearning(64, 4), MixedGradient(), MeanGradientNorm()),
    ],
)
def test_gradients_do_not_depend_on_how_a_batch_is_cut(make):
    whole, parts = smooth_network(), smooth_network()
    train(whole, make(), accumulation=1)
    train(parts, make(), accumulation=4)
    assert (flat(whole) - flat(parts)).abs().max() < 1e-6


def test_weights_and_unequal_micro_batches_give_the_gradient_of_the_weighted_mean():
    model = smooth_network()
    weights = torch.rand(10, generator=torch.Generator().manual_seed(0))
    step = Step(model, inputs=X[:10], targets=Y[:10], weights=weights)
    Accumulation(step, Regularizer(), cross_entropy, parts=3).run()
    found = [p.grad.clone() for p in model.parameters()]
    expected = torch.autograd.grad(
        (weights * F.cross_entropy(model(X[:10]), Y[:10], reduction="none")).mean(), list(model.parameters())
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_token_losses_are_divided_by_the_valid_tokens_of_the_whole_batch():
    torch.manual_seed(0)
    model, inputs = nn.Linear(5, 7), torch.randn(6, 4, 5)
    targets = torch.randint(0, 7, (6, 4))
    targets[0, 1:] = targets[3, 2:] = -100
    Accumulation(Step(model, inputs=inputs, targets=targets), Regularizer(), cross_entropy, parts=4).run()
    expected = torch.autograd.grad(F.cross_entropy(model(inputs).transpose(1, 2), targets), model.weight)[0]
    torch.testing.assert_close(model.weight.grad, expected)


def test_co_teaching_in_one_optimizer_equals_two_optimizers():
    momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    batches = loader()
    pair = fit(
        smooth_network(), batches, epochs=2, regularizer=CoTeaching(smooth_network(77)), optimizer=momentum
    ).model
    a, b = smooth_network(), smooth_network(77)
    first, second = (momentum(net.parameters()) for net in (a, b))
    for epoch in range(2):
        batches.set_epoch(epoch)
        for batch in batches:
            loss_a, loss_b = (F.cross_entropy(net(batch.inputs), batch.targets, reduction="none") for net in (a, b))
            easy_a, easy_b = (x.detach().argsort()[:12] for x in (loss_a, loss_b))
            for optimizer in (first, second):
                optimizer.zero_grad()
            (loss_a[easy_b].mean() + loss_b[easy_a].mean()).backward()
            first.step()
            second.step()
    assert isinstance(pair, Pair)
    assert (flat(pair.a) - flat(a)).abs().max() < 1e-6
    assert (flat(pair.b) - flat(b)).abs().max() < 1e-6


def test_seven_methods_compose_under_adamw_and_stay_finite():
    every = Compose(
        Coreset(8),
        SelfDistillation(64, 4),
        EarlyLearning(64, 4),
        RecordedError(),
        MixedGradient(),
        MeanGradientNorm(),
        HalfTraining(),
    )
    model = train(noisy_network(recording=True), every, accumulation=2, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    assert torch.isfinite(flat(model)).all()


def test_two_replacing_losses_are_refused_by_name():
    with pytest.raises(ValueError, match="at most one method may replace the task loss, got CoTeaching and CoTeaching"):
        Compose(CoTeaching(smooth_network()), Compose(CoTeaching(smooth_network())))


def test_records_of_a_probe_do_not_reach_the_main_forward():
    class Probe(Regularizer):
        seen = 0

        def penalty(self, step):
            before = len(step.records["error"])
            step.forward(grad=False)
            Probe.seen = len(step.records["error"]) - before
            return None

    train(noisy_network(recording=True), Probe(), epochs=1)
    assert Probe.seen == 0


def test_a_probe_leaves_buffers_modes_and_random_state_alone():
    model = noisy_network()
    model[1].eval()
    step = Step(model, inputs=X[:8])
    before = [b.clone() for b in model.buffers()]
    state = torch.get_rng_state()
    outputs = step.forward(training=True)
    outputs.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in model] == [True, False, True, True, True, True]


def test_the_closure_is_only_there_inside_on_gradients():
    with pytest.raises(RuntimeError, match="only inside on_gradients"):
        Step(smooth_network()).closure()


def test_the_closure_repeats_the_first_evaluation_exactly():
    class Repeat(Regularizer):
        def on_gradients(self, step):
            torch.rand(3)  # a hook that draws must not change what the closure draws
            first = [p.grad.clone() for p in step.model.parameters()]
            step.closure()
            assert all(torch.equal(a, p.grad) for a, p in zip(first, step.model.parameters(), strict=True))

    train(noisy_network(), Repeat(), epochs=1, accumulation=2)


def test_penalties_are_pure():
    method = EarlyLearning(64, 4)
    model = smooth_network()
    step = Step(model, inputs=X, targets=Y, index=torch.arange(64), outputs=model(X))
    before = {k: v.clone() for k, v in method.state_dict().items()}
    values = [method.penalty(step) for _ in range(3)]
    assert torch.equal(values[0], values[2])
    assert all(torch.equal(before[k], v) for k, v in method.state_dict().items())


def test_a_missing_requirement_names_both_sides_and_the_fix():
    with pytest.raises(
        RequirementError,
        match=r"EarlyStopping requires 'validation', which fit does not provide here(?s:.)*validation=",
    ):
        train(smooth_network(), EarlyStopping())
    with pytest.raises(RequirementError, match="EarlyLearning requires 'index', which my loop does not provide"):
        check_requirements(Compose(EarlyLearning(4, 2)), {"gradients"}, "my loop")


def test_a_loader_without_positions_is_refused_before_the_first_update():
    model = smooth_network()
    before = flat(model).clone()
    with pytest.raises(RequirementError, match="yields no index"):
        fit(model, [(X, Y)], epochs=1, regularizer=EarlyLearning(64, 4))
    assert torch.equal(before, flat(model))


def test_frozen_tensors_stay_bit_for_bit_under_decoupled_weight_decay():
    class OnlyLast(Regularizer):
        def on_epoch(self, step):
            if not step.finished:
                step.replace_parameters(["2.weight"] if step.epoch else ["0.weight", "0.bias", "2.weight"])

    model = smooth_network()
    kept: list[torch.Tensor] = []

    def watch(step, entry):
        kept.append(model[0].weight.detach().clone())

    optimizer = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1)
    fit(model, loader(), epochs=3, regularizer=OnlyLast(), optimizer=optimizer, on_epoch_end=watch)
    assert torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[0], smooth_network()[0].weight)


def test_parameters_cannot_be_replaced_under_data_parallelism():
    class Fake(nn.parallel.DistributedDataParallel):
        def __init__(self):
            nn.Module.__init__(self)

    step = Step(Fake(), SGD([nn.Parameter(torch.zeros(1))]))
    with pytest.raises(RuntimeError, match="cannot change which parameters train under Fake"):
        step.replace_parameters(["a"])


def test_a_skipped_mixed_precision_step_moves_nothing_and_stores_no_row():
    seen = []

    class Watch(Regularizer):
        def on_step(self, step):
            seen.append(step.number)

    method = EarlyLearning(64, 4)
    model = smooth_network()
    before = flat(model).clone()
    # So large a scale overflows float16 gradients in the first steps; the scaler then backs off.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=10**6)
    poisoned = X.clone()
    poisoned[:16] = float("nan")
    batches = TensorLoader(poisoned, Y, batch_size=16)
    with pytest.raises(DivergenceError):
        fit(clone_of(model), batches, epochs=1, regularizer=EarlyLearning(64, 4), optimizer=SGD)
    fit(
        model, batches, epochs=1, regularizer=Compose(method, Watch(), SharpnessAwareMinimization(0.01)), optimizer=SGD,
        amp=torch.float16, scaler=scaler,
    )  # fmt: skip
    assert 0 not in seen
    assert not method.table.visited[:16].any()
    assert torch.isfinite(method.table.rows).all()
    assert torch.isfinite(flat(model)).all()
    if not seen:
        assert torch.equal(before, flat(model))


def clone_of(model):
    twin = smooth_network()
    twin.load_state_dict(model.state_dict())
    return twin


def test_a_batch_coupled_method_warns_under_accumulation():
    with pytest.warns(UserWarning, match="CoTeaching couples the examples of a batch"):
        train(smooth_network(), CoTeaching(smooth_network(1)), epochs=1, accumulation=2)


KILLED = """
    import os, sys, torch
    from functools import partial
    sys.path[:0] = {paths}
    from doubles import SelfDistillation, HalfTraining, MeanGradientNorm, MixedGradient, data, noisy_network
    from wellposed import Compose, Regularizer, TensorLoader, fit
    from wellposed.losses import EarlyLearning, Mixup
    from wellposed.weights import EarlyStopping, WeightAveraging

    class Kill(Regularizer):
        def on_batch(self, step):
            if step.number == int(sys.argv[2]):
                os._exit(9)

    X, Y = data()
    everything = Compose(
        Mixup(0.4, num_classes=4), EarlyLearning(64, 4), MixedGradient(), MeanGradientNorm(), HalfTraining(),
        WeightAveraging(0.9), EarlyStopping(), Kill(),
    )
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    schedule = lambda o, total: torch.optim.lr_scheduler.CosineAnnealingLR(o, total)
    data = torch.utils.data.TensorDataset(X, Y)
    result = fit(noisy_network(), data, epochs=4, batch_size=16, regularizer=everything, optimizer=optimizer,
                 scheduler=schedule, validation=data, checkpoint=sys.argv[1], clip_norm=1.0, accumulation=2)
    torch.save((result.model.state_dict(), everything.state_dict(), [e["loss"] for e in result.history]), sys.argv[3])
"""


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    script = tmp_path / "run.py"
    support = str(Path(__file__).parents[1] / "support")
    script.write_text(textwrap.dedent(KILLED).replace("{paths}", repr([support])))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(name, kill_at):
        command = [sys.executable, str(script), str(tmp_path / name), str(kill_at), str(tmp_path / f"{name}.pt")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert run("whole", -1).returncode == 0
    assert run("killed", 10).returncode == 9
    resumed = run("killed", -1)
    assert resumed.returncode == 0, resumed.stderr
    whole, killed = (torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("whole", "killed"))
    assert whole[2] == killed[2]
    for expected, found in zip(whole[:2], killed[:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.ckpt"
    train(smooth_network(), epochs=1, checkpoint=path)
    with pytest.raises(RuntimeError, match="belongs to a run with epochs=1, this one has epochs=2"):
        train(smooth_network(), epochs=2, checkpoint=path)


def test_a_full_disk_leaves_the_previous_checkpoint_intact(tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    train(smooth_network(), epochs=1, checkpoint=path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wellposed.checkpoint.os.fsync", full)
    with pytest.raises(RuntimeError, match="No space left on device; the previous checkpoint is intact"):
        save_atomically({"run": {}}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_averaging_under_another_method_averages_what_that_method_attached():
    averaging = WeightAveraging(0.5)
    model = train(smooth_network(), Compose(CoTeaching(smooth_network(5)), averaging), epochs=1)
    assert isinstance(model, Pair)


def test_gradients_are_clipped_for_each_network_of_a_pair():
    from wellposed.parameters import clip_gradients

    pair = Pair(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    pair.a.weight.grad, pair.b.weight.grad = torch.tensor([[8.0]]), torch.tensor([[0.5]])
    clip_gradients(pair, 1.0)
    assert float(pair.a.weight.grad) == pytest.approx(1.0, abs=1e-4)
    assert float(pair.b.weight.grad) == 0.5

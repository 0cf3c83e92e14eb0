"""Half fine-tuning: frozen is frozen, the rest trains as it would alone, and stages, resumes and other methods compose."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from wellposed import Compose, Regularizer, fit
from wellposed.gradients import SharpnessAwareMinimization
from wellposed.studies.problems.half_freezing_cases import (
    half_tuned_loss,
    penalised_loss,
    penalised_minimum,
    quadratic,
)
from wellposed.weights.element_mask import FrozenEntries
from wellposed.weights.half_fine_tuning import STRATEGIES, HalfFineTuning
from wellposed.weights.interpolation import half_reset
from wellposed.weights.low_rank import LowRankAdaptation

CLASSES, LENGTH = 11, 5


class Layer(nn.Module):
    """One head of attention, a gated feed-forward layer, two norms."""

    def __init__(self, d):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.norm_1, self.norm_2 = nn.RMSNorm(d), nn.RMSNorm(d)

    def forward(self, x):
        y = self.norm_1(x)
        q, k, v = self.q_proj(y), self.k_proj(y), self.v_proj(y)
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        y = self.norm_2(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Model(nn.Module):
    def __init__(self, d=8, layers=2, seed=0):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.embed_tokens = nn.Embedding(CLASSES, d)
            self.layers = nn.ModuleList(Layer(d) for _ in range(layers))
            self.norm = nn.RMSNorm(d)
            self.lm_head = nn.Linear(d, CLASSES, bias=False)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def sequences(count=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(CLASSES, (count, LENGTH), generator=g)
    return TensorDataset(tokens, (tokens + 3) % CLASSES)


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def step(model, optimizer, seed=0, set_to_none=True):
    tokens, targets = sequences(8, seed).tensors
    optimizer.zero_grad(set_to_none=set_to_none)
    F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
    optimizer.step()


def adamw(groups, **options):
    return torch.optim.AdamW(groups, **{"lr": 0.01, "weight_decay": 0.1, **options})


def check_frozen(model, method, start):
    frozen = trained = 0
    for name, p in model.named_parameters():
        mask = method.mask()[name]
        trains = mask if isinstance(mask, torch.Tensor) else torch.full(p.shape, mask)
        assert torch.equal(p.detach()[~trains], start[name][~trains]), name
        frozen += int((~trains).sum())
        trained += int((p.detach() != start[name])[trains].sum())
    assert frozen > 0 and trained > 0


# ── frozen ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_tensors_keep_their_values_bit_for_bit(strategy, set_to_none):
    model = Model()
    optimizer = adamw(model.parameters())
    step(model, optimizer)  # momentum and gradients from before
    method = HalfFineTuning(strategy=strategy)
    method.new_stage(model, optimizer, force=True)
    start = snapshot(model)
    for number in range(8):
        step(model, optimizer, number, set_to_none)
    check_frozen(model, method, start)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_in_fit_and_free_afterwards(strategy):
    model, method = Model(), HalfFineTuning(strategy=strategy, seed=2)
    start = snapshot(model)
    fit(model, sequences(), epochs=2, batch_size=8, regularizer=method, optimizer=adamw, clip_norm=1.0)
    check_frozen(model, method, start)
    assert all(p.requires_grad for p in model.parameters())


def test_a_gradient_of_zero_would_not_have_frozen():
    model = Model()
    optimizer = adamw(model.parameters())
    weight = model.layers[0].q_proj.weight
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert not torch.equal(weight, before)


def test_ratio_0_is_full_fine_tuning():
    plain, half = Model().double(), Model().double()
    method = HalfFineTuning(ratio=0.0)
    method.new_stage(half)
    one, two = adamw(plain.parameters()), adamw(method.trainable_parameters())
    for number in range(5):
        step(plain, one, number)
        step(half, two, number)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), half.parameters(), strict=True))


def test_ratio_1_is_a_linear_probe_of_what_trains_always():
    model = Model()
    method = HalfFineTuning(ratio=1.0, trainable_always=("lm_head",))
    start = snapshot(model)
    fit(model, sequences(), epochs=1, regularizer=method, optimizer=adamw)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, start[name])]
    assert moved == ["lm_head.weight"]


def test_gradients_of_what_trains_are_those_of_full_fine_tuning():
    full, half = Model(), Model()
    HalfFineTuning(seed=4).new_stage(half)
    tokens, targets = sequences(8).tensors
    for model in (full, half):
        F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
    compared = 0
    for (name, p), q in zip(half.named_parameters(), full.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9, msg=name)
            compared += 1
        else:
            assert p.grad is None
    assert compared > 9


# ── the quadratic ─────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("draw", range(3))
def test_gradient_descent_on_the_free_half_ends_at_the_schur_complement(draw):
    hessian, target, start, trains = quadratic(draw)
    model = nn.ParameterDict({str(i): nn.Parameter(start[i : i + 1].clone()) for i in range(len(start))})
    groups = [[str(i) for i in range(len(start)) if not trains[i]], [str(i) for i in range(len(start)) if trains[i]]]
    # Which half is frozen is given here; the method freezes all of its only group.
    method = HalfFineTuning(ratio=1.0, groups=[groups[0]], trainable_always=())
    method.new_stage(model)
    rate = 1.0 / float(torch.linalg.eigvalsh(hessian)[-1])
    optimizer = torch.optim.SGD(method.trainable_parameters(), lr=rate)
    for _ in range(1200):
        optimizer.zero_grad()
        d = torch.cat([model[str(i)] for i in range(len(start))]) - target
        loss = 0.5 * d @ hessian @ d
        loss.backward()
        optimizer.step()
    theta = torch.cat([model[str(i)].detach() for i in range(len(start))])
    f, p = trains, ~trains
    closed = target[f] - torch.linalg.solve(hessian[f][:, f], hessian[f][:, p] @ (start - target)[p])
    torch.testing.assert_close(theta[f], closed, rtol=0, atol=1e-8)
    assert torch.equal(theta[p], start[p])
    assert float(loss.detach()) == pytest.approx(float(half_tuned_loss(hessian, target, start, trains)), abs=1e-8)


@pytest.mark.parametrize("draw", range(5))
def test_the_penalty_tends_to_half_fine_tuning_as_one_over_lambda(draw):
    hessian, target, start, trains = quadratic(draw)
    hessian = hessian * (50 / torch.linalg.eigvalsh(hessian)[-1])
    f, p = trains, ~trains
    limit = start.clone()
    limit[f] = target[f] - torch.linalg.solve(hessian[f][:, f], hessian[f][:, p] @ (start - target)[p])
    errors = [(penalised_minimum(hessian, target, start, trains, s) - limit).norm() for s in (1e3, 1e6)]
    assert float(errors[0] / errors[1]) == pytest.approx(1e3, rel=0.05)


def test_the_penalised_optimum_bounds_half_fine_tuning_from_below():
    for draw in range(10):
        problem = quadratic(draw, 6)
        values = [float(penalised_loss(*problem, s)) for s in (0.0, 0.5, 1.0, 10.0, 1e3, 1e6)]
        half = float(half_tuned_loss(*problem))
        assert all(a <= b + 1e-9 for a, b in zip(values, [*values[1:], half], strict=True))


# ── the optimizer ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_only_what_trains_has_optimizer_state():
    model = Model()
    method = HalfFineTuning()
    method.new_stage(model)
    optimizer = adamw(method.trainable_parameters())
    step(model, optimizer)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert set(optimizer.state) == set(trainable)
    size = sum(v.numel() * v.itemsize for s in optimizer.state.values() for k, v in s.items() if k != "step")
    assert size == 2 * 4 * sum(p.numel() for p in trainable)


@pytest.mark.parametrize("resample", ["epoch", 3])
def test_a_new_half_within_a_run(resample):
    model, method = Model(layers=4), HalfFineTuning(seed=1, resample=resample)
    seen, first, untouched = [], {}, {name for name, _ in model.named_parameters()}
    start = snapshot(model)

    class Watch(Regularizer):
        def on_batch(self, step):
            nonlocal untouched
            trains = {n for n, p in step.model.named_parameters() if p.requires_grad}
            held = {id(p) for group in step.optimizer.param_groups for p in group["params"]}
            assert held == {id(p) for p in step.model.parameters() if p.requires_grad}
            assert {id(p) for p in step.optimizer.state} <= held
            if not seen or seen[-1] != trains:
                seen.append(trains)
                first.clear()
                first.update({n: p.detach().clone() for n, p in step.model.named_parameters()})
            untouched -= trains

        def on_step(self, step):
            if not first:
                return
            new = seen[-1] - seen[-2] if len(seen) > 1 else set()
            for name, p in step.model.named_parameters():
                if name in new:  # its first step is that of a fresh optimizer
                    big = p.grad.abs() > 1e-3
                    torch.testing.assert_close(
                        (p.detach() - first[name])[big], -0.01 * p.grad.sign()[big], rtol=0, atol=1e-5
                    )
                    assert float(step.optimizer.state[p]["step"]) == 1
            first.clear()

    # Watched before the method draws again in its own `on_step`.
    fit(
        model, sequences(), epochs=3, batch_size=8, regularizer=Compose(Watch(), method),
        optimizer=lambda groups: adamw(groups, weight_decay=0.0, eps=1e-12),
    )  # fmt: skip
    assert len(seen) == (3 if resample == "epoch" else 4) and len({frozenset(s) for s in seen}) == len(seen)
    # Never-touched tensors are where the first stage found them.
    assert all(torch.equal(dict(model.named_parameters())[n], start[n]) for n in untouched)


def test_old_momentum_is_dropped_or_kept():
    for keep in (False, True):
        model = Model()
        method = HalfFineTuning(keep_optimizer_state=keep, seed=1)
        optimizer = adamw(model.parameters())
        step(model, optimizer)
        before = {p: copy.deepcopy(optimizer.state[p]) for p in model.parameters()}
        method.new_stage(model, optimizer, force=True)
        frozen = {p for p in model.parameters() if not p.requires_grad}
        assert frozen and not frozen & set(optimizer.state)
        optimizer.zero_grad()
        method.new_stage(model, optimizer)
        back = {p for p in frozen if p.requires_grad}
        assert back
        for p in back:
            assert (p in optimizer.state) == keep
            if keep:
                assert torch.equal(optimizer.state[p]["exp_avg"], before[p]["exp_avg"])


def test_tensors_come_back_to_their_own_group():
    model = Model(layers=4)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    spared = [p for p in model.parameters() if p.ndim < 2]
    optimizer = adamw([{"params": decayed, "weight_decay": 0.5}, {"params": spared, "weight_decay": 0.0}])
    method = HalfFineTuning()
    for _ in range(4):
        method.new_stage(model, optimizer)
        assert all(p.ndim == 2 for p in optimizer.param_groups[0]["params"])
        assert all(p.ndim < 2 for p in optimizer.param_groups[1]["params"]) and optimizer.param_groups[1]["params"]
    # An optimizer that was built within a stage does not know the others; names of other layers tell.
    model = Model(layers=8)
    method.new_stage(model)
    optimizer = adamw(
        [
            {"params": [p for p in method.trainable_parameters() if p.ndim == 2]},
            {"params": [p for p in method.trainable_parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
    )
    method.new_stage(model, optimizer)
    assert all(p.ndim < 2 for p in optimizer.param_groups[1]["params"])


# ── stages, state, other methods ──────────────────────────────────────────────────────────────────────────────────────
def test_every_fit_is_a_stage_with_a_half_of_its_own():
    model, method, halves = Model(layers=4), HalfFineTuning(seed=3), []
    for stage in range(3):
        start = snapshot(model)
        fit(model, sequences(seed=stage), epochs=1, regularizer=method, optimizer=adamw)
        halves.append(frozenset(n for n, m in method.mask().items() if m is False))
        assert all(torch.equal(dict(model.named_parameters())[n], start[n]) for n in halves[-1])
    assert len(set(halves)) == 3 and method.stage == 3
    model.zero_grad()
    again = HalfFineTuning(seed=3)
    again.load_state_dict(method.state_dict())
    again.new_stage(copy.deepcopy(model))
    method.new_stage(model)
    assert again.mask() == method.mask()


def test_what_the_user_froze_stays_frozen():
    model = Model()
    model.embed_tokens.requires_grad_(False)
    method = HalfFineTuning()
    fit(model, sequences(), epochs=1, regularizer=method)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["embed_tokens.weight"]
    assert method.mask()["embed_tokens.weight"] is False


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resample": "epoch"},
        {"resample": 3},
        {"strategy": "element"},
        {"resample": 3, "keep_optimizer_state": True},
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(options, tmp_path):
    def train(file, kill_after=None):
        def kill(step, entry):
            if step.epoch == kill_after:
                raise KeyboardInterrupt

        return fit(
            Model(), sequences(), epochs=4, batch_size=8, regularizer=HalfFineTuning(seed=5, **options),
            optimizer=adamw, checkpoint=tmp_path / file, on_epoch_end=kill,
        ).model  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        train("killed", kill_after=3)
    for a, b in zip(train("killed").parameters(), train("whole").parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_other_arguments_is_refused():
    with pytest.raises(ValueError, match="the saved state has seed=1, not 2"):
        HalfFineTuning(seed=2).load_state_dict(HalfFineTuning(seed=1).state_dict())


def test_a_copy_does_not_carry_the_model_along():
    model, method = Model(), HalfFineTuning()
    method.new_stage(model)
    other = copy.deepcopy(method)
    assert other.mask() == method.mask() and not list(method.parameters())
    with pytest.raises(RuntimeError, match="call new_stage"):
        other.trainable_parameters()


def test_accumulation_and_clipping_change_nothing_for_the_frozen_half():
    ends = []
    for accumulation in (1, 4):
        model = Model()
        fit(
            model, sequences(), epochs=2, batch_size=16, accumulation=accumulation, clip_norm=0.5,
            regularizer=Compose(HalfFineTuning(seed=1), SharpnessAwareMinimization(0.05)),
            optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        )  # fmt: skip
        ends.append(model)
    for a, b in zip(*(m.parameters() for m in ends), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class Replay(Regularizer):
    """Adds old examples to every batch."""

    def __init__(self, tokens, targets):
        super().__init__()
        self.tokens, self.targets = tokens, targets

    def on_batch(self, step):
        step.inputs = torch.cat([step.inputs, self.tokens])
        step.targets = torch.cat([step.targets, self.targets])
        step.index = None


def test_it_composes_with_replay_in_continual_stages():
    model, method, old = Model(), HalfFineTuning(seed=1), sequences(8, seed=9).tensors
    for stage in range(2):
        start = snapshot(model)
        fit(model, sequences(seed=stage), epochs=1, regularizer=Compose(method, Replay(*old)), optimizer=adamw)
        check_frozen(model, method, start)


def test_a_stage_of_preference_optimization():
    """DPO as a criterion: pairs of a chosen and a rejected sequence, against the model at the start of the stage."""
    model, reference = Model(), Model().requires_grad_(False)
    pairs = torch.stack([sequences(16, seed).tensors[0] for seed in (1, 2)], 1)

    def log_likelihood(network, tokens):
        logits = network(tokens[:, :-1]).log_softmax(-1)
        return logits.gather(2, tokens[:, 1:, None]).sum((1, 2))

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pair):
            ours = [log_likelihood(self.model, pair[:, i]) for i in (0, 1)]
            theirs = [log_likelihood(reference, pair[:, i]) for i in (0, 1)]
            return 0.1 * ((ours[0] - theirs[0]) - (ours[1] - theirs[1]))

    method, policy = HalfFineTuning(seed=1), Policy()
    start = snapshot(policy)
    result = fit(
        policy, TensorDataset(pairs, torch.zeros(16)), epochs=20, regularizer=method, optimizer=adamw,
        criterion=lambda margin, _: -F.logsigmoid(margin),
    )  # fmt: skip
    check_frozen(policy, method, start)
    assert result.history[-1]["loss"] < 0.8 * math.log(2)


def test_half_reset_takes_the_mask_of_the_last_stage():
    model, method = Model(), HalfFineTuning(strategy="element")
    base = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, sequences(), epochs=1, regularizer=method, optimizer=adamw)
    tuned = model.state_dict()
    assert all(torch.equal(v, tuned[n]) for n, v in half_reset(tuned, base, method.mask()).items())


# ── what must raise ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5}, r"ratio must be a number in \[0, 1\], got 1.5"),
        ({"ratio": -0.1}, "ratio must be"),
        ({"ratio": float("nan")}, "ratio must be"),
        ({"resample": 0}, "resample must be 'stage', 'epoch' or an integer >= 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=f"HalfFineTuning: {message}"):
        HalfFineTuning(**options)


@pytest.mark.parametrize("options", [{"strategy": "rows"}, {"balance": "rows"}, {"resample": "never"}])
def test_unknown_choices_are_refused(options):
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        HalfFineTuning(**options)


def test_nothing_to_train_is_refused():
    model = Model()
    with pytest.raises(ValueError, match=r"ratio=1.0 with trainable_always=\(\) leaves nothing to train"):
        HalfFineTuning(ratio=1.0, trainable_always=()).new_stage(model)
    assert all(p.requires_grad for p in model.parameters())


def test_gradients_of_an_unfinished_step_are_refused_unless_forced():
    model, method = Model(), HalfFineTuning()
    step(model, adamw(model.parameters()))
    with pytest.raises(RuntimeError, match=r"'embed_tokens.weight' holds a gradient.*force=True"):
        method.new_stage(model)
    assert method.stage == 0
    method.new_stage(model, force=True)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_adapters_are_refused():
    model = LowRankAdaptation(rank=2).attach(Model())
    with pytest.raises(ValueError, match=r"trains adapters \('layers.0.q_proj' holds lora_A\).*merge"):
        HalfFineTuning().attach(model)
    peft = pytest.importorskip("peft")
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], r=2), Model())
    with pytest.raises(ValueError, match="trains adapters"):
        HalfFineTuning().new_stage(wrapped)


def test_an_optimizer_that_cannot_let_go_is_refused():
    model = Model()
    for optimizer in (torch.optim.LBFGS(model.parameters()), type("Engine", (), {"param_groups": ()})()):
        with pytest.raises(TypeError):
            HalfFineTuning().new_stage(model, optimizer)
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_entries_check_their_masks():
    p = nn.Parameter(torch.zeros(2))
    for masks in ({"q": torch.ones(2, dtype=torch.bool)}, {"p": torch.ones(3, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="FrozenEntries: masks"):
            FrozenEntries({"p": p}, masks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("strategy", ["category", "element"])
def test_frozen_on_a_gpu(strategy):
    model, method = Model().cuda(), HalfFineTuning(strategy=strategy, seed=2)
    start = {n: p.cpu() for n, p in snapshot(model).items()}
    fit(model, sequences(), epochs=2, regularizer=method, optimizer=adamw, device="cuda")
    check_frozen(model.cpu(), method, start)

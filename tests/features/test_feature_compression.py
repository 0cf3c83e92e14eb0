"""Compression as a method: where it is inserted, how k* is chosen, what is left of it, and with whom it composes."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from doubles import data, flat, noisy_network, smooth_network
from torch import nn

from wellposed import Compose, Hyperparameter, Pair, Regularizer, RequirementError, Step, TensorLoader, fit
from wellposed.evaluation import predict
from wellposed.features import FeatureCompression, NestedDropout
from wellposed.features.insertion import insert, inserted, remove
from wellposed.hyperparameter import substituted
from wellposed.losses import CoTeaching, EarlyLearning, Mixup
from wellposed.weights import EarlyStopping, WeightAveraging

X, Y = data()
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
HELD = TensorLoader(torch.randn(40, 8, generator=torch.Generator().manual_seed(9)), Y[:40], batch_size=16)


def train(method, model=None, epochs=3, **options):
    options = {"optimizer": SGD, "validation": HELD, **options}
    return fit(
        model or smooth_network(), TensorLoader(X, Y, batch_size=16, shuffle=True), epochs=epochs, regularizer=method,
        **options,
    )  # fmt: skip


class Accuracies(Regularizer):
    """Accuracy of every prefix after each epoch, by slicing; and the k* that was chosen."""

    def __init__(self):
        super().__init__()
        self.curves, self.chosen = [], []

    def on_epoch(self, step):
        if step.number == 0:
            return
        networks = [step.model.a, step.model.b] if isinstance(step.model, Pair) else [step.model]
        found = []
        for k in range(1, 17):
            logits = 0
            for net in networks:
                hidden = net[:2](HELD.inputs)
                logits = logits + hidden[:, :k] @ net[2].weight[:, :k].T + net[2].bias
            found.append(float((logits.argmax(1) == HELD.targets).float().mean()))
        self.curves.append(found)
        self.chosen.append(inserted(networks[-1][2]).eval_k)


def best(curve):
    return max(range(16), key=lambda i: (curve[i] - 1e-5 * i, -i)) + 1


def test_it_is_inserted_before_the_last_linear_layer_and_names_stay():
    model = smooth_network()
    names, hidden = list(dict(model.named_parameters())), model[:2](X)
    FeatureCompression(dist=F.one_hot(torch.tensor(4), 16).float(), select=None).attach(model)
    assert list(dict(model.named_parameters())) == names
    expected = hidden[:, :5] @ model[2].weight[:, :5].T + model[2].bias
    torch.testing.assert_close(model(X), expected)
    assert isinstance(inserted(model[2]), NestedDropout)
    assert inserted(model[0]) is None


def test_all_probability_on_the_full_prefix_is_plain_training_bit_for_bit():
    full = F.one_hot(torch.tensor(15), 16).float()
    found = train(FeatureCompression(dist=full, select=None), noisy_network()).model

    # The layer draws one number a pass, so plain training draws it too.
    class Draw(nn.Module):
        def forward(self, features):
            if self.training:
                torch.rand(1, 1)
            return features

    plain = noisy_network()
    insert(plain[5], Draw())
    assert torch.equal(flat(found), flat(train(None, plain).model))


def test_dropout_is_inverted_and_acts_on_the_classifier_s_input_alone():
    model = smooth_network()
    method = FeatureCompression("dropout", p=0.5)
    method.attach(model)
    torch.manual_seed(0)
    found = model(X)
    torch.manual_seed(0)
    expected = model[2].weight @ F.dropout(model[:2](X), 0.5).T + model[2].bias[:, None]
    torch.testing.assert_close(found, expected.T)
    out = torch.stack([inserted(model[2])(torch.ones(1, 16)) for _ in range(4000)])
    assert ((out.mean(0) - 1).abs() < 4 * out.std(0) / 4000**0.5).all()
    model.eval()
    kept = copy.deepcopy(model)
    assert torch.equal(method.finish(model)(X), kept(X))
    assert inserted(model[2]) is None


def test_k_is_chosen_after_every_epoch_by_the_accuracies_of_all_prefixes():
    watch = Accuracies()
    method = FeatureCompression(sigma=5.0)
    train(Compose(method, watch), epochs=4)
    assert watch.chosen == [best(curve) for curve in watch.curves]
    assert method.accuracies.tolist() == pytest.approx(watch.curves[-1])
    assert method.prefix == watch.chosen[-1]


def test_finish_folds_the_prefix_into_a_plain_model():
    before = {}

    class Keep(Regularizer):
        def finish(self, model):
            before["outputs"] = predict(model, HELD)[0]
            return model

    method = FeatureCompression(sigma=3.0)
    model = train(Compose(method, Keep())).model
    assert list(model.state_dict()) == list(smooth_network().state_dict())
    assert not model[2]._forward_pre_hooks
    torch.testing.assert_close(predict(model, HELD)[0], before["outputs"])
    assert not model[2].weight[:, method.prefix :].any()
    assert model[2].weight[:, : method.prefix].any()


def test_without_folding_the_layer_and_its_prefix_stay_for_a_second_stage():
    method = FeatureCompression(sigma=3.0, fold=False)
    model = train(method).model
    layer = inserted(model[2])
    assert layer.eval_k == method.prefix
    assert int(model.state_dict()["2.compression.eval_prefix"]) == method.prefix
    again = FeatureCompression(sigma=9.0, fold=False)
    again.attach(model)
    assert inserted(model[2]) is not layer
    assert inserted(model[2]).eval_k == method.prefix
    torch.testing.assert_close(inserted(model[2]).probabilities, NestedDropout(16, 9.0).probabilities)
    assert len(model[2]._forward_pre_hooks) == 1


@pytest.mark.parametrize("first", [True, False])
def test_a_pair_shares_the_prefix_of_a_step_and_the_chosen_one(first):
    drawn = {"a": [], "b": []}

    class Watch(Regularizer):
        def on_batch(self, step):
            for key in drawn:
                layer = inserted(getattr(step.model, key)[2])
                if step.number == 0:
                    layer.register_forward_hook(
                        lambda m, args, out, key=key: (
                            drawn[key].append(int((out[0] != 0).sum())) if m.training else None
                        )
                    )

    method, watch = FeatureCompression(sigma=5.0), Accuracies()
    teaching = CoTeaching(0.25, 0, mode="full")
    both = (method, teaching) if first else (teaching, method)
    model = train(Compose(*both, watch, Watch()), epochs=3).model
    assert drawn["a"] == drawn["b"] and len(set(drawn["a"])) > 1
    assert watch.chosen == [best(curve) for curve in watch.curves]
    assert isinstance(model, Pair)
    for net in (model.a, model.b):
        assert inserted(net[2]) is None
        assert not net[2].weight[:, method.prefix :].any()


def test_early_stopping_judges_and_restores_each_epoch_with_its_own_prefix():
    judged = []

    class Judge(EarlyStopping):
        def on_epoch(self, step):
            if step.number:
                judged.append((step.validate()["accuracy"], inserted(step.model[2]).eval_k))
            super().on_epoch(step)

    watch, stopping = Accuracies(), Judge(metric="accuracy", goal="max")
    method = FeatureCompression(sigma=3.0)
    model = train(Compose(method, watch, stopping), epochs=6).model
    for (accuracy, k), curve in zip(judged, watch.curves, strict=True):
        assert k == best(curve)
        assert accuracy == pytest.approx(curve[k - 1])
    number = stopping.best_epoch - 1
    assert method.prefix == watch.chosen[number]
    outputs, targets = predict(model, HELD)
    assert float((outputs.argmax(1) == targets).float().mean()) == pytest.approx(judged[number][0])


def test_a_resumed_run_continues_bit_for_bit(tmp_path):
    def stop(step, entry):
        if step.epoch == 2:
            raise KeyboardInterrupt

    whole, method = FeatureCompression(sigma=3.0), FeatureCompression(sigma=3.0)
    expected = train(whole, epochs=4).model
    path = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        train(FeatureCompression(sigma=3.0), epochs=4, checkpoint=path, on_epoch_end=stop)
    found = train(method, epochs=4, checkpoint=path).model
    assert torch.equal(flat(found), flat(expected))
    assert method.prefix == whole.prefix


class Deep(nn.Module):
    """Two hidden layers and a classifier, as at the end of a VGG network."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.classifier = nn.Linear(8, 12), nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.classifier(self.second(self.first(x).relu()).relu())


def test_with_two_layers_alternation_masks_one_of_them_in_each_step_and_the_second_is_scanned():
    active = []

    class Watch(Regularizer):
        def on_backward(self, step):
            active.append((inserted(step.model.second).active, inserted(step.model.classifier).active))

    method = FeatureCompression(sigma=4.0, before=["second", "classifier"], alternate=True)
    model = train(Compose(method, Watch()), Deep(), epochs=10).model
    assert set(active) == {(True, False), (False, True)}
    assert abs(sum(a for a, _ in active) - 20) < 4 * 10**0.5  # a fair coin, 40 steps
    assert model.second.weight.any(0).all()
    assert not model.classifier.weight[:, method.prefix :].any()


def test_before_a_module_in_the_middle_prefixes_are_measured_by_passes_through_the_model():
    method = FeatureCompression(sigma=4.0, before="second", ks=[1, 3, 12])
    model = train(method, Deep()).model
    found = []
    for k in (1, 3, 12):
        hidden = model.first(HELD.inputs).relu()
        hidden[:, k:] = 0
        logits = model.classifier(model.second(hidden).relu())
        found.append(float((logits.argmax(1) == HELD.targets).float().mean()))
    # The model is folded: behind k* the passes agree with its own.
    at = method.lengths.index(method.prefix)
    assert method.accuracies.tolist()[: at + 1] == pytest.approx(found[: at + 1])
    assert FeatureCompression(before="second").requires == {"validation"}
    grid = FeatureCompression(sigma=4.0, before="second")
    train(grid, Deep(), epochs=1)
    assert grid.lengths == [1, 2, 4, 8, 12]


def test_the_channels_before_a_convolution_are_masked_and_folded():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv1d(1, 6, 3),
        nn.ReLU(),
        nn.Conv1d(6, 4, 3),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
    )
    method = FeatureCompression(sigma=2.0, before="3")
    model = train(method, model).model
    assert method.lengths == [1, 2, 4, 6]
    assert not model[3].weight[:, method.prefix :].any()


def test_where_folding_would_change_others_the_layer_stays():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encode, self.decode = nn.Linear(16, 4), nn.Linear(16, 4)
            self.body = nn.Linear(8, 16)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(self.body(x).relu())

    model = Tied()
    method = FeatureCompression(sigma=3.0, before="decode")
    found = train(method, model).model
    assert inserted(found.decode).eval_k == method.prefix
    assert found.encode.weight.any(0).all()
    pool = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 4))
    kept = FeatureCompression(sigma=3.0, before="2", num_features=16)
    assert inserted(train(kept, pool).model[2]).eval_k == kept.prefix


def test_tokens_without_a_label_do_not_count():
    torch.manual_seed(0)
    tokens, targets = torch.randn(10, 6, 8), torch.randint(0, 4, (10, 6))
    targets[:, 4:] = -100
    held = TensorLoader(tokens, targets, batch_size=4)
    method = FeatureCompression(sigma=3.0)
    model = smooth_network()
    result = fit(model, held, epochs=2, regularizer=method, optimizer=SGD, validation=held)
    at = float((predict(result.model, held)[0].argmax(-1) == targets)[:, :4].float().mean())
    assert float(method.accuracies[method.prefix - 1]) == pytest.approx(at)


def test_one_standard_error_never_chooses_a_longer_prefix_than_the_best():
    lengths = {}
    for rule in ("best", "one_se"):
        method = FeatureCompression(sigma=6.0, select=rule)
        train(method, epochs=6)
        lengths[rule] = method.prefix
    assert lengths["one_se"] <= lengths["best"]


def test_sigma_and_p_may_be_hyperparameters():
    sigma = Hyperparameter(0.1, low=0.0)
    method = FeatureCompression(sigma=sigma, select=None)
    model = method.attach(smooth_network())
    hidden = model[:2](X)
    torch.testing.assert_close(model(X), hidden[:, :1] @ model[2].weight[:, :1].T + model[2].bias)
    p = Hyperparameter(0.25, 0.0, 1.0)
    dropped = FeatureCompression("dropout", p=p)
    model = dropped.attach(smooth_network())
    zeros = torch.stack([inserted(model[2])(torch.ones(64, 16)) == 0 for _ in range(50)]).float().mean()
    assert abs(float(zeros) - 0.25) < 0.01


def test_a_rate_that_a_tuner_differentiates_drops_like_a_plain_one_and_without_a_warning():
    p = Hyperparameter(0.25, 0.0, 1.0)
    learned = FeatureCompression("dropout", p=p).attach(smooth_network())
    fixed = FeatureCompression("dropout", p=float(p.value)).attach(smooth_network())
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else PyTorch warns once a process, perhaps in an earlier test
    try:
        with warnings.catch_warnings(), substituted({p: p.raw.clone().requires_grad_()}):
            warnings.simplefilter("error")
            assert p.value.requires_grad
            torch.manual_seed(0)
            dropped = learned(X)
    finally:
        torch.set_warn_always(before)
    torch.manual_seed(0)
    assert torch.equal(dropped, fixed(X))


def test_a_model_that_carries_the_layer_can_be_copied_and_pickled():
    model = FeatureCompression(sigma=3.0, select=None).attach(smooth_network())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        inserted(twin[2]).eval_k = 2
        assert inserted(model[2]).eval_k is None
        twin.eval()
        hidden = twin[:2](X)
        torch.testing.assert_close(twin(X), hidden[:, :2] @ twin[2].weight[:, :2].T + twin[2].bias)
    assert remove(model[2]) is not None
    assert remove(model[2]) is None


@pytest.mark.parametrize(
    "other",
    [
        lambda: WeightAveraging(0.9),
        lambda: EarlyStopping(),
        lambda: EarlyLearning(64, 4),
        lambda: Mixup(0.4, num_classes=4),
        lambda: CoTeaching(0.25, 0),
    ],
)
@pytest.mark.parametrize("kind", ["nested", "dropout"])
def test_it_composes(kind, other):
    for alternative in ({"accumulation": 2}, {"amp": torch.bfloat16}):
        found = train(Compose(FeatureCompression(kind), other()), noisy_network(), epochs=2, **alternative)
        assert torch.isfinite(flat(found.model)).all()
        names = [name for name in found.model.state_dict() if "compression" in name]
        assert not names


def test_a_second_evaluation_of_the_batch_keeps_the_same_prefix():
    class Repeat(Regularizer):
        def on_gradients(self, step):
            first = [p.grad.clone() for p in step.model.parameters()]
            step.closure()
            assert all(torch.equal(a, p.grad) for a, p in zip(first, step.model.parameters(), strict=True))

    train(Compose(FeatureCompression(sigma=4.0), Repeat()), epochs=1, accumulation=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 0.5}, "p belongs to kind='dropout'; nested dropout and dropout exclude each other"),
        ({"kind": "dropout", "sigma": 3.0}, "sigma, dist, mu and rate belong to kind='nested'"),
        ({"kind": "dropout", "p": 1.0}, r"p must lie in \[0, 1\), got 1"),
        ({"kind": "dropout", "p": -0.1}, r"p must be in \[0, 1\], got -0.1"),
        ({"sigma": -1.0}, "sigma must be >= 0, got -1.0"),
        ({"before": []}, "before must name a module"),
        ({"alternate": True}, r"before must name a module \(at least two with alternate\), got None"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureCompression(**arguments)


def test_models_and_loops_that_do_not_fit_are_refused_by_name():
    with pytest.raises(RequirementError, match="FeatureCompression requires 'validation'"):
        train(FeatureCompression(), validation=None)
    with pytest.raises(ValueError, match="no linear layer to compress the input of"):
        FeatureCompression().attach(nn.ReLU())
    with pytest.raises(ValueError, match="before must name a module of the model, got '3'; did you mean"):
        FeatureCompression(before="3").attach(smooth_network())
    with pytest.raises(ValueError, match="before a Tanh, num_features must be given"):
        FeatureCompression(before="1").attach(smooth_network())

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x) + 0 * self.unused.weight.sum()

    with pytest.raises(ValueError, match="never calls the Linear whose input is to be compressed"):
        train(FeatureCompression(), Unused())
    step = Step(smooth_network(), number=1)
    method = FeatureCompression()
    method.attach(step.model)
    with pytest.raises(ValueError, match=r"select needs step.validation"):
        method.on_epoch(step)
    step.validation = TensorLoader(X, X[:, 0].clone())
    with pytest.raises(ValueError, match="choosing a prefix needs classes as targets"):
        method.on_epoch(step)

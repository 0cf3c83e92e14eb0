"""The nested dropout layer: what it draws, what it keeps, and that ordered features are the principal ones."""

import copy
import math
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn

from wellposed import Hyperparameter
from wellposed.features import NestedDropout, keep_probabilities, prefix_distribution
from wellposed.features.prefix_lengths import default_sigma


def only(k, size):
    """All probability on prefix k."""
    return torch.nn.functional.one_hot(torch.tensor(k - 1), size).float()


def draws(layer, rows):
    """Prefix lengths drawn for that many examples."""
    return layer(torch.ones(rows, layer.num_features)).sum(1).long()


def test_with_all_probability_on_the_last_prefix_it_is_the_identity_bit_for_bit():
    features = torch.randn(8, 5, requires_grad=True)
    for rescale in (False, True):
        layer = NestedDropout(5, dist=only(5, 5), rescale=rescale)
        for training in (True, False):
            out = layer.train(training)(features)
            assert torch.equal(out, features)
            (gradient,) = torch.autograd.grad(out.sum(), features)
            assert torch.equal(gradient, torch.ones(8, 5))


def test_with_all_probability_on_k_it_zeroes_the_rest_and_their_gradient():
    features = torch.randn(8, 5, requires_grad=True)
    out = NestedDropout(5, dist=only(2, 5))(features)
    assert torch.equal(out[:, :2], features[:, :2])
    assert torch.equal(out[:, 2:], torch.zeros(8, 3))
    out.square().sum().backward()
    assert torch.equal(features.grad[:, 2:], torch.zeros(8, 3))
    assert (features.grad[:, :2] != 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"sigma": 8.0},
        {"sigma": 6.0, "mu": 12.0},
        {"dist": "geometric", "rate": 0.15},
        {"dist": "uniform"},
        {"dist": torch.tensor([0.1, 0.0, 0.4, 0.0, 0.0, 0.5])},
    ],
)
def test_prefixes_are_drawn_from_the_distribution_asked_for(options):
    size, count = 6 if isinstance(options.get("dist"), torch.Tensor) else 40, 100_000
    layer = NestedDropout(size, per="sample", generator=torch.Generator().manual_seed(0), **options)
    k = draws(layer, count)
    expected = layer.probabilities.double()
    found = torch.bincount(k - 1, minlength=size)
    assert (found[expected == 0] == 0).all()
    common = expected * count >= 5
    rare = float(expected[~common].sum()) * count
    f, e = found[common].tolist(), (expected[common] * count).tolist()
    if rare > 0:
        f, e = [*f, int(found[~common].sum())], [*e, rare]
    e = [value * sum(f) / sum(e) for value in e]
    assert chisquare(f, e).pvalue > 1e-3
    kept = keep_probabilities(layer.probabilities).double()
    frequency = (k[:, None] > torch.arange(size)).double().mean(0)
    assert ((frequency - kept).abs() <= 4 * (kept * (1 - kept) / count).sqrt() + 1e-6).all()


def test_a_prefix_is_drawn_for_the_batch_or_for_each_example():
    assert len(draws(NestedDropout(30), 64).unique()) == 1
    assert len(draws(NestedDropout(30, per="sample"), 64).unique()) > 5


@pytest.mark.parametrize("sigma", [5.0, 10.0, 20.0])
def test_the_gaussian_sums_to_one_decreases_and_has_the_known_mean(sigma):
    p = prefix_distribution(100, sigma=sigma, dtype=torch.float64)
    assert abs(float(p.sum()) - 1) < 1e-12
    assert (p[1:] < p[:-1]).all()
    k = torch.arange(1, 101, dtype=torch.float64)
    mean = (sigma**2 / 2 - 1 / 12) / (sigma * math.sqrt(math.pi) / 2 - 0.5)
    assert float(p @ k) == pytest.approx(mean, rel=1e-3)
    assert torch.allclose(p / p[0], torch.exp(-((k / sigma) ** 2) + 1 / sigma**2), rtol=1e-12)


def test_the_geometric_distribution_is_the_truncated_one():
    p = prefix_distribution(50, "geometric", rate=0.3, dtype=torch.float64)
    torch.testing.assert_close(p[1:] / p[:-1], torch.full((49,), 0.7, dtype=torch.float64), rtol=1e-12, atol=0)
    assert abs(float(p.sum()) - 1) < 1e-12


@given(st.integers(1, 300), st.floats(0.5, 200.0))
def test_keep_probabilities_begin_at_one_and_decrease(size, sigma):
    kept = keep_probabilities(prefix_distribution(size, sigma=sigma))
    assert float(kept[0]) == 1.0
    assert (kept[1:] <= kept[:-1]).all()
    assert (kept >= 0).all()


def test_the_default_sigma_is_a_fifth_of_the_features_within_10_and_100():
    assert [default_sigma(k) for k in (8, 100, 256, 1000)] == [10.0, 20.0, 51.2, 100.0]
    assert torch.equal(NestedDropout(256).probabilities, NestedDropout(256, 51.2).probabilities)


def test_both_ways_of_drawing_have_the_exact_mean_loss():
    torch.manual_seed(0)
    features, target = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    weight = torch.randn(8, dtype=torch.float64)
    p = prefix_distribution(8, sigma=4.0, dtype=torch.float64)
    masks = torch.ones(8, 8, dtype=torch.float64).tril()
    exact = float(p @ ((features * masks[:, None] @ weight - target) ** 2).mean(1))
    for per, count in (("batch", 4000), ("sample", 4000)):
        layer = NestedDropout(8, 4.0, per=per, generator=torch.Generator().manual_seed(1))
        losses = torch.stack([((layer(features) @ weight - target) ** 2).mean() for _ in range(count)])
        assert abs(float(losses.mean()) - exact) < 4 * float(losses.std()) / math.sqrt(count)


def test_the_mean_output_is_the_keep_probability_times_the_input_and_rescaling_makes_it_the_input():
    features = torch.rand(1, 12, generator=torch.Generator().manual_seed(0)) + 0.5
    for rescale in (False, True):
        layer = NestedDropout(12, 5.0, per="sample", rescale=rescale, generator=torch.Generator().manual_seed(2))
        out = layer(features.expand(60_000, 12))
        kept = layer.keep_probabilities()
        expected = features[0] if rescale else kept * features[0]
        error = out.std(0) / math.sqrt(len(out))
        assert ((out.mean(0) - expected).abs() <= 4 * error + 1e-6).all()


def test_rescaling_passes_finite_gradients_also_where_a_feature_is_never_kept():
    p = torch.tensor([0.5, 0.5, 0.0])
    for dtype in (torch.float32, torch.float16):
        features = torch.ones(4, 3, dtype=dtype, requires_grad=True)
        NestedDropout(3, dist=p, rescale=True)(features).sum().backward()
        assert torch.isfinite(features.grad).all()


def test_evaluation_is_deterministic_and_keeps_the_chosen_prefix():
    features = torch.randn(6, 10)
    layer = NestedDropout(10).eval()
    assert torch.equal(layer(features), features)
    for k in (1, 4, 10):
        layer.eval_k = k
        out = layer(features)
        assert torch.equal(out, layer(features))
        assert torch.equal(out[:, :k], features[:, :k])
        assert not out[:, k:].any()
    layer.eval_k = None
    assert layer.eval_k is None
    assert torch.equal(layer(features), features)


def test_the_state_dict_holds_distribution_and_prefix():
    first = NestedDropout(10, 3.0)
    first.eval_k = 4
    second = NestedDropout(10, dist="uniform")
    second.load_state_dict(first.state_dict())
    assert second.eval_k == 4
    features = torch.randn(5, 10)
    assert torch.equal(first.eval()(features), second.eval()(features))
    torch.manual_seed(0)
    a = first.train()(features)
    torch.manual_seed(0)
    assert torch.equal(a, second.train()(features))


def test_feature_maps_are_masked_by_channel_and_sequences_by_their_last_dimension():
    maps = torch.randn(3, 6, 4, 5)
    out = NestedDropout(6, dist=only(2, 6))(maps)
    assert torch.equal(out[:, :2], maps[:, :2])
    assert not out[:, 2:].any()
    tokens = torch.randn(3, 7, 6)
    out = NestedDropout(6, dist=only(2, 6), dim=-1)(tokens)
    assert torch.equal(out[..., :2], tokens[..., :2])
    assert not out[..., 2:].any()
    each = NestedDropout(6, dist="uniform", dim=-1, per="sample")(torch.ones(64, 7, 6))
    assert torch.equal(each, each[:, :1].expand_as(each))
    assert len(each[:, 0].sum(1).unique()) > 3


@given(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]), st.integers(0, 5), st.integers(1, 9)
)
def test_any_dtype_and_shape_passes_through(dtype, rows, size):
    features = torch.randn(rows, size).to(dtype)
    for training in (True, False):
        out = NestedDropout(size, per="sample").train(training)(features)
        assert out.dtype == dtype and out.shape == features.shape


def test_half_precision_models_keep_the_distribution_in_float32():
    layer = NestedDropout(200, 20.0)
    before = layer.probabilities.clone()
    assert torch.equal(layer.half().probabilities, before)
    assert layer(torch.ones(2, 200, dtype=torch.float16)).dtype == torch.float16


def test_the_global_seed_and_a_generator_decide_the_draw():
    features = torch.ones(4, 50)
    layer = NestedDropout(50)
    torch.manual_seed(5)
    first = layer(features)
    torch.manual_seed(5)
    assert torch.equal(layer(features), first)
    own = NestedDropout(50, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    own(features)
    assert torch.equal(state, torch.get_rng_state())


def test_a_follower_keeps_what_its_leader_kept():
    first, second = NestedDropout(100), NestedDropout(100)
    second.follow(first)
    features = torch.ones(2, 100)
    for _ in range(5):
        assert torch.equal(first(features), second(features[:1].expand(3, 100))[:2])
    twins = copy.deepcopy(nn.ModuleList([first, second]))
    assert torch.equal(twins[0](features), twins[1](features))
    assert twins[1]._leader[0] is twins[0]
    assert "_leader" not in str(second.state_dict()) and len(list(second.children())) == 0
    second.follow(None)
    assert len({int(second(features)[0].sum()) for _ in range(20)} - {int(first(features)[0].sum())}) > 0
    with pytest.raises(ValueError, match="a leader must have 100 features and draw per batch"):
        second.follow(NestedDropout(99))
    with pytest.raises(ValueError, match="a leader must be another layer"):
        second.follow(second)


def test_an_inactive_layer_lets_everything_pass_in_training():
    layer = NestedDropout(4, dist=only(1, 4))
    layer.active = False
    features = torch.randn(2, 4)
    assert torch.equal(layer(features), features)
    assert "eval_k=None" in repr(layer)


def test_sigma_may_be_a_hyperparameter_and_is_read_at_every_draw():
    sigma = Hyperparameter(0.2, low=0.0)
    layer = NestedDropout(50, sigma)
    assert int(draws(layer, 1)) == 1
    sigma.set_(30.0)
    torch.testing.assert_close(layer.keep_probabilities(), NestedDropout(50, 30.0).keep_probabilities())
    assert sigma.name == "NestedDropout.sigma"
    assert not list(layer.parameters())


def test_it_survives_pickling():
    layer = NestedDropout(10, 3.0)
    layer.eval_k = 3
    features = torch.randn(4, 10)
    assert torch.equal(pickle.loads(pickle.dumps(layer)).eval()(features), layer.eval()(features))


COMPILED = """
    import torch
    from wellposed.features import NestedDropout
    layer, features = NestedDropout(10, 3.0), torch.randn(4, 10)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for training in (True, False):
        layer.train(training)
        torch.manual_seed(0)
        expected = layer(features)
        torch.manual_seed(0)
        assert torch.equal(compiled(features), expected)
"""


@pytest.mark.slow
def test_it_compiles_to_one_graph_that_draws_the_same():
    # In a process of its own: the shape checks of the tests cannot be traced.
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(COMPILED)], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_draws_stay_on_the_device():
    layer = NestedDropout(64, per="sample").cuda()
    features = torch.ones(32, 64, device="cuda")
    assert layer(features).device == features.device
    layer.eval_k = 3
    assert int(layer.eval()(features).sum()) == 96


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_features": 0}, "num_features must be >= 1, got 0"),
        ({"sigma": 0.0}, "sigma must be > 0, got 0"),
        ({"sigma": -1.0}, "sigma must be >= 0, got -1.0"),
        ({"dist": "uniform", "sigma": 3.0}, "sigma and mu belong to dist='gaussian'"),
        ({"dist": "geometric"}, "rate must be given for dist='geometric'"),
        ({"dist": "geometric", "rate": 1.0}, r"rate must lie in \(0, 1\), got 1.0"),
        ({"dist": torch.tensor([0.5, 0.5])}, r"dist must have shape \(4,\), got \(2,\)"),
        ({"dist": torch.tensor([1.5, -0.5, 0.0, 0.0])}, "dist must hold probabilities >= 0, got -0.5"),
        ({"dist": torch.full((4,), 0.2)}, "dist must sum to 1, got 0.8"),
        ({"dist": torch.full((4,), 0.25), "sigma": 2.0}, "sigma, mu and rate belong to a named dist"),
        ({"dim": 0}, "dim must not be 0"),
        ({"per": "sample", "sync": True}, "sync needs per='batch'"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        NestedDropout(**{"num_features": 4, **arguments})


def test_inputs_and_prefixes_that_do_not_fit_are_refused_by_name():
    layer = NestedDropout(4)
    with pytest.raises(ValueError, match=r"input must have 4 features along dim 1, got shape \(2, 5\)"):
        layer(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"along dim 1, got shape \(4,\)"):
        layer(torch.zeros(4))
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"eval_k must lie in \[1, 4\] or be None, got {k}"):
            layer.eval_k = k


RANKS = """
    import sys, torch
    import torch.distributed as dist
    from wellposed.features import NestedDropout
    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)
    x = torch.ones(1, 1000)
    found = [[int(layer(x).sum()) for _ in range(3)] for layer in (NestedDropout(1000), NestedDropout(1000, sync=True))]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_draw_their_own_prefix_unless_they_are_synchronised(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(RANKS))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen([sys.executable, str(script), str(r), str(tmp_path)], env=environment, stderr=subprocess.PIPE)
        for r in range(2)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    (own_a, shared_a), (own_b, shared_b) = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    assert own_a != own_b
    assert shared_a == shared_b


@pytest.mark.slow
def test_a_linear_auto_encoder_under_nested_dropout_recovers_the_ordered_principal_components():
    size = 6
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    spectrum = torch.tensor([6.0, 4.5, 3.0, 2.0, 1.2, 0.5], dtype=torch.float64)
    covariance = basis * spectrum @ basis.T
    layer = NestedDropout(size, dist="uniform").eval()
    masks = []
    for k in range(1, size + 1):
        layer.eval_k = k
        masks.append(layer(torch.ones(1, size, dtype=torch.float64))[0])
    masks, p = torch.stack(masks), layer.probabilities.double()
    p = p / p.sum()
    encoder = torch.randn(size, size, dtype=torch.float64, requires_grad=True)
    decoder = torch.randn(size, size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [encoder, decoder], max_iter=3000, history_size=50, tolerance_grad=1e-13, tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective():
        left = torch.eye(size, dtype=torch.float64) - (decoder * masks[:, None]) @ encoder
        return p @ ((left @ covariance) * left).sum((1, 2))

    def closure():
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    products = decoder.T[:, :, None] * encoder[:, None, :]
    expected = basis.T[:, :, None] * basis.T[:, None, :]
    assert (products - expected).abs().max() < 1e-4
    tails = torch.stack([spectrum[k:].sum() for k in range(1, size + 1)])
    assert abs(objective().item() - float(p @ tails)) < 1e-9

"""A coreset's features: exact gradients, zeroth-order slopes, Adam's scaling, the coordinates that are kept."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from wellposed import Step
from wellposed.gradients import adam_features
from wellposed.gradients.adam_features import AdamMoments, GradientRows, adam_direction, sparse_features
from wellposed.gradients.coreset_gradients import CoresetGradients
from wellposed.gradients.greedy_medoids import facility_location, pairwise_similarity
from wellposed.gradients.last_layer_gradient import last_linear_weight, linear_gradients, mean_token_loss
from wellposed.gradients.zeroth_order import directional_differences
from wellposed.objective import cross_entropy
from wellposed.step import LoopServices
from wellposed.studies.problems.coreset_cases import replay_shortfall

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(dtype=torch.float32, dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(16, 12),
        nn.Tanh(),
        nn.Linear(12, 4),
    ).to(dtype)


def pool(model, n=20, dtype=torch.float32):
    g = generator(1)
    return Step(
        model, inputs=torch.randn(n, 6, generator=g, dtype=dtype), targets=torch.randint(0, 4, (n,), generator=g)
    )


class TinyDecoder(nn.Module):
    """Causal blocks in a ModuleList, called by keyword, that return tuples: what language models look like."""

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.q_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)

        def forward(self, x, mask):
            scores = (self.q_proj(x) @ x.transpose(1, 2) / 4).masked_fill(mask, -torch.inf)
            return (x + scores.softmax(-1) @ self.v_proj(x).tanh(),)

    def __init__(self, layers=3, width=8, vocabulary=11):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(self.Block(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary)
        self.calls = 0

    def forward(self, input_ids, attention_mask):
        length = input_ids.shape[1]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mask = future | (attention_mask[:, None, :] == 0)
        mask = mask & ~torch.eye(length, dtype=torch.bool)
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, mask=mask)[0]
        return {"logits": self.head(x)}


def tokens(model, n=8, length=7):
    g = generator(2)
    ids, targets = (torch.randint(0, 11, (n, length), generator=g) for _ in range(2))
    lengths = torch.randint(2, length + 1, (n,), generator=g)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return Step(model, inputs={"input_ids": ids, "attention_mask": mask}, targets=targets.masked_fill(mask == 0, -100))


def token_loss(outputs, targets):
    return cross_entropy(outputs["logits"], targets)


def gradients(feature="last_layer_grad", parameter=None, criterion=cross_entropy, m=1, eps=1e-3, chunk=None):
    return CoresetGradients(feature, parameter, criterion, m, True, eps, chunk, 0)


def one_by_one(step, parameter, criterion=cross_entropy):
    """Gradients of each example's mean loss by a backward pass of its own."""
    model = step.model.eval()
    tensor = dict(model.named_parameters())[parameter]
    rows = []
    for i in range(len(step.targets)):
        inputs = (
            {k: v[i : i + 1] for k, v in step.inputs.items()}
            if isinstance(step.inputs, dict)
            else step.inputs[i : i + 1]
        )
        targets = step.targets[i : i + 1]
        outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        valid = targets != -100 if targets.ndim == 2 else None
        loss = mean_token_loss(criterion(outputs, targets), valid).sum()
        rows.append(torch.autograd.grad(loss, tensor)[0].flatten())
    return torch.stack(rows)


# ── exact gradients ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("parameter", ["6.weight", "4.weight", "0.weight", "6.bias", "1.weight"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_exact_gradients_equal_a_backward_pass_an_example(parameter, chunk):
    step = pool(network(F64, dropout=0.5), dtype=F64)
    found = gradients(parameter=parameter, chunk=chunk).rows(step, torch.arange(20), 0)
    expected = one_by_one(step, parameter)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found.left, expected, rtol=0, atol=1e-12)
    some = torch.tensor([3, 4, 11])
    torch.testing.assert_close(
        gradients(parameter=parameter).rows(step, some, 0).left, expected[some], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "parameter", ["layers.2.v_proj.weight", "layers.1.q_proj.weight", "head.weight", "layers.2.v_proj.bias"]
)
def test_exact_gradients_of_a_language_model_are_means_over_own_tokens(parameter):
    step = tokens(TinyDecoder().double())
    expected = one_by_one(step, parameter, token_loss)
    for chunk in (None, 3):
        found = gradients(parameter=parameter, criterion=token_loss, chunk=chunk).rows(step, torch.arange(8), 0)
        torch.testing.assert_close(found.left, expected, rtol=0, atol=1e-12)


def test_features_do_not_depend_on_companions_or_padding():
    model = TinyDecoder()
    step = tokens(model)
    short = int(step.inputs["attention_mask"].sum(1).argmin())
    length = int(step.inputs["attention_mask"][short].sum())
    alone = Step(
        model,
        inputs={k: v[short : short + 1, :length] for k, v in step.inputs.items()},
        targets=step.targets[short : short + 1, :length],
    )
    name = "layers.2.v_proj.weight"
    for feature in ("last_layer_grad", "zo"):
        both = [
            gradients(feature, name, token_loss, m=3).rows(one, rows, 0)
            for one, rows in ((step, torch.arange(8)), (alone, torch.tensor([0])))
        ]
        found = [rows.columns(slice(None))[which] for rows, which in zip(both, (short, 0), strict=True)]
        torch.testing.assert_close(*found, rtol=0, atol=1e-5 if feature == "last_layer_grad" else 1e-3)


def test_a_layer_that_is_called_twice_adds_up():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared = nn.Linear(6, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.shared(self.shared(self.first(x)).tanh())

    torch.manual_seed(0)
    step = pool(Twice().double(), dtype=F64)
    found = gradients(parameter="shared.weight").rows(step, torch.arange(20), 0).left
    torch.testing.assert_close(found, one_by_one(step, "shared.weight"), rtol=0, atol=1e-12)


def test_inner_products_of_linear_gradients_equal_those_of_their_factors():
    g = generator()
    a, b = torch.randn(6, 5, 7, generator=g, dtype=F64), torch.randn(6, 5, 3, generator=g, dtype=F64)
    rows = linear_gradients(a, b)
    factored = torch.einsum("nti,msi,nto,mso->nm", a, a, b, b)
    torch.testing.assert_close(rows @ rows.T, factored)


def test_the_last_adapted_weight_is_found_and_frozen_ones_are_passed_over():
    model = network()
    assert last_linear_weight(model) == "6.weight"
    model[6].weight.requires_grad_(False)
    assert last_linear_weight(model) == "4.weight"
    with pytest.raises(ValueError, match="trains no linear layer"):
        last_linear_weight(nn.Conv1d(1, 1, 1))


def test_what_cannot_be_compared_is_named(monkeypatch):
    step = pool(network())
    with pytest.raises(ValueError, match="the model has no parameter '7.weight'"):
        gradients(parameter="7.weight").rows(step, torch.arange(4), 0)
    monkeypatch.setattr("wellposed.gradients.last_layer_gradient.LARGEST", 100)
    with pytest.raises(ValueError, match="more than 2 GB"):
        gradients().rows(step, torch.arange(4), 0)
    with pytest.raises(ValueError, match=r"feature must return \(4, d\)"):
        gradients(lambda step: torch.zeros(3, 2)).rows(step, torch.arange(4), 0)


# ── zeroth order ──────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("dtype, eps, tolerance", [(torch.float32, 1e-3, 1e-3), (F64, 1e-5, 1e-6)])
def test_differences_are_directional_derivatives(dtype, eps, tolerance):
    step = pool(network(dtype), dtype=dtype)
    rows = gradients("zo", "4.weight", m=4, eps=eps).rows(step, torch.arange(20), 0)
    exact = one_by_one(step, "4.weight") @ rows.right.T / 4
    assert float((rows.left - exact).abs().max()) <= tolerance * float(exact.abs().max())


def test_the_error_falls_with_the_square_of_the_difference():
    step = pool(network(F64), dtype=F64)
    errors = []
    for eps in (0.08, 0.04, 0.02):
        rows = gradients("zo", "6.weight", m=2, eps=eps).rows(step, torch.arange(20), 0)
        errors.append(float((rows.left - one_by_one(step, "6.weight") @ rows.right.T / 2).abs().max()))
    assert errors[0] > 1e-7
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1) and errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_the_mean_over_directions_points_along_the_gradient():
    m, d = 256, 1000
    g = generator()
    slope = torch.randn(d, generator=g, dtype=F64)
    z = torch.randn(40, m, d, generator=g, dtype=F64)
    estimate = torch.einsum("rmd,rm->rd", z, z @ slope) / m
    cosine = F.cosine_similarity(estimate, slope.expand_as(estimate)).mean()
    assert float(cosine) == pytest.approx((m / (m + d)) ** 0.5, rel=0.05)
    rows = GradientRows((z[0] @ slope)[None] / m, z[0])
    torch.testing.assert_close(rows.columns(slice(None))[0], estimate[0])


def test_blocks_in_front_run_once_and_the_model_is_left_as_it_was():
    model = TinyDecoder()
    step = tokens(model)
    counts = dict.fromkeys(range(3), 0)
    for i, layer in enumerate(model.layers):
        layer.v_proj.register_forward_pre_hook(lambda module, args, i=i: counts.__setitem__(i, counts[i] + 1))
    name = "layers.2.v_proj.weight"
    before = dict(model.named_parameters())[name]
    values = before.detach().clone()
    maker = gradients("zo", name, token_loss, m=5)
    rows = maker.rows(step, torch.arange(8), 0)
    assert counts == {0: 1, 1: 1, 2: 12}  # two to check, ten to measure
    assert dict(model.named_parameters())[name] is before and torch.equal(before, values)
    assert all("forward" not in layer.__dict__ for layer in model.layers)
    exact = one_by_one(step, name, token_loss) @ rows.right.T / 5
    torch.testing.assert_close(rows.left, exact, rtol=0, atol=1e-3)


def test_blocks_that_do_not_follow_each_other_are_not_skipped():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))

        def forward(self, x):
            return sum((i + 1) * branch(x).tanh() for i, branch in enumerate(self.branches))

    torch.manual_seed(0)
    step = pool(Parallel().double(), dtype=F64)
    for chunk in (None, 6):
        maker = gradients("zo", "branches.2.weight", m=2, chunk=chunk, eps=1e-5)
        rows = maker.rows(step, torch.arange(20), 0)
        assert maker._zeroth._skips is False
        exact = one_by_one(step, "branches.2.weight") @ rows.right.T / 2
        torch.testing.assert_close(rows.left, exact, rtol=0, atol=1e-5)


def test_a_parametrised_weight_is_perturbed_where_it_lives():
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    model = network(F64)
    parametrize.register_parametrization(model[6], "weight", Double())
    step, name = pool(model, dtype=F64), "6.parametrizations.weight.original"
    rows = gradients("zo", name, m=2).rows(step, torch.arange(20), 0)
    torch.testing.assert_close(rows.left, one_by_one(step, name) @ rows.right.T / 2, rtol=0, atol=1e-5)
    found = gradients(parameter=name).rows(step, torch.arange(20), 0)
    torch.testing.assert_close(found.left, one_by_one(step, name), rtol=0, atol=1e-12)


def test_half_precision_is_refused_and_the_loops_autocast_is_not_used():
    step = pool(network(torch.bfloat16), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"feature='zo' needs float32.*bfloat16"):
        gradients("zo").rows(step, torch.arange(4), 0)
    step = pool(network())
    plain = gradients("zo").rows(step, torch.arange(20), 0).left
    mixed = dataclasses.replace(step, services=LoopServices(autocast=lambda: torch.autocast("cpu", torch.bfloat16)))
    assert torch.equal(gradients("zo").rows(mixed, torch.arange(20), 0).left, plain)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast to torch.bfloat16"):
        gradients("zo").rows(step, torch.arange(4), 0)
    exact = gradients().rows(mixed, torch.arange(20), 0).left
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact, gradients().rows(step, torch.arange(20), 0).left, rtol=0, atol=0.05)


def test_differences_are_made_anew_from_the_parameter():
    seen = []
    directional_differences(lambda phi: seen.append(phi) or phi[:1], torch.tensor([1.0]), torch.ones(3, 1), 1e-3)
    assert all(torch.equal(phi, seen[i % 2]) for i, phi in enumerate(seen)) and len(seen) == 6


# ── Adam and sparsity ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_normalisation_and_history_follow_a_loop_over_twenty_steps():
    g = generator()
    n, d, b1, b2, eps = 9, 5, 0.9, 0.999, 1e-8
    moments = AdamMoments.start(torch.zeros(d, dtype=F64), (b1, b2), eps)
    m, v = [0.0] * d, [0.0] * d
    for t in range(20):
        rows = torch.randn(n, d, generator=g, dtype=F64)
        picked = torch.randperm(n, generator=g)[:4]
        found = moments.direction(rows)
        news = [
            [(b1 * m[j] + (1 - b1) * float(x[j]), b2 * v[j] + (1 - b2) * float(x[j]) ** 2) for j in range(d)]
            for x in rows
        ]
        for i in range(n):
            for j in range(d):
                mean, square = news[i][j]
                expected = (mean / (1 - b1 ** (t + 1))) / ((square / (1 - b2 ** (t + 1))) ** 0.5 + eps)
                assert float(found[i, j]) == pytest.approx(expected, rel=1e-12)
        moments = moments.after(GradientRows(rows[picked]).moment_sums(), 4)
        m = [sum(news[i][j][0] for i in picked.tolist()) / 4 for j in range(d)]
        v = [sum(news[i][j][1] for i in picked.tolist()) / 4 for j in range(d)]
    torch.testing.assert_close(moments.first, torch.tensor(m, dtype=F64), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.second, torch.tensor(v, dtype=F64), rtol=1e-12, atol=0)


def test_at_the_first_step_features_are_signs():
    g = generator()
    p, z = torch.randn(50, 1, generator=g), torch.randn(1, 200, generator=g)
    rows = GradientRows(p, z).columns(slice(None))
    found = adam_direction(rows, torch.zeros(200), torch.zeros(200), 0)
    large = rows.abs() > 1e-2
    torch.testing.assert_close(found[large], rows.sign()[large], rtol=0, atol=1e-5)
    exact = adam_direction(rows.double(), torch.zeros(200, dtype=F64), torch.zeros(200, dtype=F64), 0, eps=0.0)
    torch.testing.assert_close(exact, rows.sign().double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("adam", [False, True])
def test_with_one_direction_features_lie_on_a_line_and_picks_are_greedy_on_it(adam):
    for seed in range(10):
        g = generator(seed)
        z = torch.randn(1, 60, generator=g, dtype=F64)
        moments = AdamMoments.start(z[0], (0.9, 0.999), 0.0) if adam else None
        for _ in range(5):
            p = torch.randn(30, 1, generator=g, dtype=F64)
            features = sparse_features(GradientRows(p, z), torch.zeros(30, dtype=torch.int64), 1, 20, moments)
            centred = torch.linalg.svdvals(features - features.mean(0))
            assert features.shape == (30, 20) and float(centred[1]) < 1e-10 * float(centred[0])
            picks, _ = facility_location(pairwise_similarity(features), 8)
            if moments is None:
                assert replay_shortfall(pairwise_similarity(p), picks) <= 1e-9
            else:
                moments = moments.after(GradientRows(p[picks], z).moment_sums(), 8)


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("adam", [False, True])
def test_the_largest_coordinates_of_each_source_are_kept(low_rank, adam, monkeypatch):
    g = generator()
    rows = GradientRows(torch.randn(12, 3, generator=g, dtype=F64), torch.randn(3, 50, generator=g, dtype=F64))
    dense = GradientRows(rows.columns(slice(None)))
    moments = (
        AdamMoments(torch.randn(50, generator=g, dtype=F64), torch.rand(50, generator=g, dtype=F64), 3)
        if adam
        else None
    )
    source = torch.tensor([0, 1] * 6)
    found = sparse_features(rows if low_rank else dense, source, 2, 7, moments)
    every = dense.left if moments is None else moments.direction(dense.left)
    for q in (0, 1):
        own = every[source == q]
        kept = own[:, own.mean(0).abs().topk(7).indices.sort().values]
        # The order of coordinates is free: compare what distances see.
        torch.testing.assert_close(
            torch.cdist(found[source == q], found[source == q], p=1), torch.cdist(kept, kept, p=1)
        )
    monkeypatch.setattr(adam_features, "CHUNK", 8)
    chunked = sparse_features(rows if low_rank else dense, source, 2, 7, moments)
    torch.testing.assert_close(chunked.sort(1).values, found.sort(1).values)
    whole = sparse_features(rows if low_rank else dense, source, 2, 99, moments)
    torch.testing.assert_close(whole.sort(1).values, every.sort(1).values)


def test_sums_of_moments_do_not_write_a_product_out(monkeypatch):
    g = generator()
    rows = GradientRows(torch.randn(6, 2, generator=g, dtype=F64), torch.randn(2, 30, generator=g, dtype=F64))
    dense = rows.columns(slice(None))
    monkeypatch.setattr(adam_features, "CHUNK", 7)
    for found, expected in zip(rows.moment_sums(), (dense.sum(0), dense.square().sum(0)), strict=True):
        torch.testing.assert_close(found, expected)
    bad = GradientRows(torch.tensor([[1.0], [float("nan")], [float("inf")]]), torch.ones(1, 3))
    assert bad.finite().tolist() == [True, False, False]

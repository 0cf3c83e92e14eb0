"""The networks of a comparison: defaults by the kind of data, and the user's own, checked before any training."""

import numpy as np
import pytest
import torch
from torch import nn

from wellposed.compare.errors import UserError
from wellposed.compare.models import check_model, default_model, describe_model, load_user_model
from wellposed.compare.source import Source
from wellposed.compare.task import Task


def prepared(*shape, kind="classification", classes=("a", "b")):
    inputs = np.random.default_rng(0).normal(size=(40, *shape)).astype(np.float32)
    targets = np.arange(40) % len(classes) if kind == "classification" else inputs.reshape(40, -1).sum(1)
    return Task.prepare(Source("made", inputs, targets, kind, classes if kind == "classification" else ()))


@pytest.mark.parametrize(
    ("shape", "description"),
    [((31,), "MLP 31-256-256-2"), ((1, 8, 8), "MLP 64-256-256-2"), ((3, 15, 40), "MLP 1800-256-256-2")],
)
def test_tables_and_tiny_images_get_a_perceptron(shape, description):
    task = prepared(*shape)
    assert describe_model(default_model(task, 0), task) == description


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32), (1, 28, 28), (4, 17, 33)])
def test_larger_images_get_a_convolutional_network_of_about_100k_parameters(shape):
    task = prepared(*shape, classes=tuple("abcdefgh"))
    model = default_model(task, 0)
    assert model(torch.zeros(2, *shape)).shape == (2, 8)
    assert 80_000 < sum(p.numel() for p in model.parameters()) < 120_000


def test_regression_has_one_output():
    task = prepared(3, kind="regression")
    assert check_model(None, task)(torch.zeros(5, 3)).shape == (5, 1)


def test_the_seed_alone_decides_the_initialisation_and_the_global_random_state_stays():
    task = prepared(5)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = default_model(task, 7)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(456)
    second, other = default_model(task, 7), default_model(task, 8)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a module of the user's into the current folder; a name of its own keeps the tests apart."""
    count = iter(range(100))
    monkeypatch.chdir(tmp_path)

    def module(code):
        name = f"users_{tmp_path.name}_{next(count)}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text("import torch\nfrom torch import nn\n" + code)
        return name

    return module


@pytest.mark.parametrize(
    "signature", ["input_shape, num_outputs", "num_outputs, input_shape", "width=4, **given", "*, num_outputs=9"]
)
def test_the_function_gets_the_keywords_that_it_takes(write, signature):
    outputs = "given['num_outputs']" if "given" in signature else "num_outputs"
    name = write(f"def build({signature}): return nn.Linear(4, {outputs})\n")
    assert check_model(f"{name}:build", prepared(4)).out_features == 2


def test_a_users_model_is_initialised_by_the_seed(write):
    spec = write("class Net(nn.Linear):\n    def __init__(self): super().__init__(4, 2)\n") + ":Net"
    task = prepared(4)
    a, b, c = (load_user_model(spec, task, seed).weight for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert describe_model(check_model(spec, task), task) == "Net, 10 parameters"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def build(): return 5", r"must return a torch.nn.Module, got int$"),
        ("def build(): return nn.Linear(4, 7)", r"must return a tensor of shape \(2, 2\), got \(2, 7\)$"),
        ("def build(): return nn.LSTM(4, 2)", r"must return a tensor of shape \(2, 2\), got tuple$"),
        ("def build(): return nn.Linear(3, 2)", r"a forward pass on inputs of shape \(2, 4\) failed: RuntimeError: "),
        ("def build(): return nn.Identity()", r"got \(2, 4\)$"),
        ("def build(): return nn.Linear(4, 2).requires_grad_(False)", "has no parameter that trains$"),
        ("def build(): raise RuntimeError('several\\nlines')", "calling it failed: RuntimeError: several$"),
        ("def build(depth): return nn.Linear(4, 2)", "calling it failed: TypeError: .*'depth'$"),
        ("def bulid(): return nn.Linear(4, 2)", r"has no function 'build'. Did you mean 'bulid'\?$"),
        ("build = 3", "holds no function, but a value, under 'build'"),
        ("def build(:", "cannot import 'users_.*': SyntaxError: "),
        ("raise SystemExit(3)", "cannot import 'users_.*': SystemExit: 3$"),
        ("import not_installed_at_all", "cannot import 'users_.*': ModuleNotFoundError: No module named 'not_installed_at_all'$"),
        ("net = nn.Linear(4, 2)\ndef build(): return net", "must build a new module each time; two calls returned the same weights$"),
    ],
)  # fmt: skip
def test_a_wrong_model_is_refused_in_one_line(write, code, message):
    with pytest.raises(UserError, match=message) as error:
        check_model(write(code + "\n") + ":build", prepared(4))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["module", ":function", "module:", ""])
def test_the_words_of_the_option_are_checked(spec):
    with pytest.raises(UserError, match="--model must read module:function, got"):
        check_model(spec, prepared(4))


def test_a_frozen_backbone_may_be_shared(write):
    name = write(
        "backbone = nn.Linear(4, 3).requires_grad_(False)\ndef build(): return nn.Sequential(backbone, nn.Linear(3, 2))\n"
    )
    assert isinstance(check_model(f"{name}:build", prepared(4)), nn.Sequential)

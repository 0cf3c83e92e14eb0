"""The networks of a comparison: a sensible default by the kind of data, or the user's own."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import torch
from torch import nn

from .errors import UserError, suggestion
from .task import Task

WIDTH = 256
SMALL_IMAGE = 16
"""Images below this many pixels a side are too small for pooling: they get a multilayer perceptron."""


def default_model(task: Task, seed: int) -> nn.Module:
    """A multilayer perceptron for tables and tiny images, a small convolutional network for larger ones.

    Args:
        task: the prepared data.
        seed: of the initialisation; torch's global random state is left as it was.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if len(task.input_shape) == 3 and min(task.input_shape[1:]) >= SMALL_IMAGE:
            return _convolutional(task.input_shape[0], task.num_outputs)
        size = 1
        for extent in task.input_shape:
            size *= extent
        layers = [
            nn.Linear(size, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, task.num_outputs),
        ]
        return nn.Sequential(nn.Flatten(), *layers) if len(task.input_shape) > 1 else nn.Sequential(*layers)


def _convolutional(channels: int, outputs: int) -> nn.Sequential:
    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

    return nn.Sequential(
        *block(channels, 32), nn.MaxPool2d(2), *block(32, 64), nn.MaxPool2d(2), *block(64, 128),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, outputs),
    )  # fmt: skip


def load_user_model(spec: str, task: Task, seed: int) -> nn.Module:
    """The module that the user's function returns, initialised under `seed`.

    The function gets those of `input_shape` and `num_outputs` that it takes.

    Args:
        spec: "module:function"; the current folder is searched too.
        task: the prepared data.
        seed: of the initialisation.

    Raises:
        UserError: if it cannot be imported or called, or returns no module.
    """
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise UserError(f"--model must read module:function, got '{spec}'")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    # Importing runs the user's code, which may fail in any way.
    except (Exception, SystemExit) as error:
        raise UserError(f"--model {spec}: cannot import '{module_name}': {_one_line(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        what = "has no function" if function is None else "holds no function, but a value, under"
        near = suggestion(function_name, [name for name in dir(module) if not name.startswith("_")])
        raise UserError(f"--model {spec}: '{module_name}' {what} '{function_name}'.{near}")
    facts = {"input_shape": task.input_shape, "num_outputs": task.num_outputs}
    try:
        taken = inspect.signature(function).parameters
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
        keywords = {name: value for name, value in facts.items() if takes_all or name in taken}
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = function(**keywords)
    except Exception as error:
        raise UserError(f"--model {spec}: calling it failed: {_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"--model {spec}: must return a torch.nn.Module, got {type(model).__name__}")
    return model


def check_model(spec: str | None, task: Task) -> nn.Module:
    """The network, after a forward pass on two training rows showed that it fits the data.

    Raises:
        UserError: naming what the model returned, and what is expected.
    """
    if spec is None:
        return default_model(task, 0)
    model = load_user_model(spec, task, 0)
    rows = torch.from_numpy(task.inputs[task.parts["train"][:2]])
    try:
        with torch.no_grad():
            found = model.eval()(rows)
    except Exception as error:
        shape = tuple(rows.shape)
        raise UserError(
            f"--model {spec}: a forward pass on inputs of shape {shape} failed: {_one_line(error)}"
        ) from error
    expected = (2, task.num_outputs)
    if not isinstance(found, torch.Tensor) or tuple(found.shape) != expected:
        got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise UserError(f"--model {spec}: for 2 rows it must return a tensor of shape {expected}, got {got}")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if not trained:
        raise UserError(f"--model {spec}: the model has no parameter that trains")
    # Shared weights would carry what one trial learned into the next.
    if any(id(p) in trained for p in load_user_model(spec, task, 0).parameters()):
        raise UserError(f"--model {spec}: must build a new module each time; two calls returned the same weights")
    return model.train()


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def describe_model(model: nn.Module, task: Task) -> str:
    """A few words: "MLP 31-256-256-2", or the class and its number of parameters."""
    layers = [m for m in model.modules() if not list(m.children())]
    linear = [m for m in layers if isinstance(m, nn.Linear)]
    plain = all(isinstance(m, (nn.Linear, nn.ReLU, nn.Flatten, nn.Dropout)) for m in layers)
    if isinstance(model, nn.Sequential) and plain and linear:
        widths = [linear[0].in_features, *(m.out_features for m in linear)]
        return "MLP " + "-".join(map(str, widths))
    count = sum(p.numel() for p in model.parameters())
    kind = "CNN" if isinstance(model, nn.Sequential) else type(model).__name__
    return f"{kind}, {count:,} parameters"

"""The batch mean of a network's prediction as a function of its weights: gradient, and gradient of the gradient's norm."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..batching import Batch, batch_size, call_model, cut, map_tensors
from ..numerics.tree import global_norm
from ..step import collect_records, copied_buffers, forked_rng

OutputFunction = Callable[[Any], Tensor]
Curvature = Literal["exact", "finite_difference"]
Result = TypeVar("Result")
Part = tuple[Any, float]
"""Inputs of one micro-batch, and its share of the whole batch."""


def in_full_precision(method: Callable[..., Result]) -> Callable[..., Result]:
    """Run a method of `MeanPrediction` outside of autocast, which would also round what a double backward computes."""

    @functools.wraps(method)
    def wrapped(self: MeanPrediction, *arguments: Any, **keywords: Any) -> Result:
        with torch.autocast(self.parameters[0].device.type, enabled=False):
            return method(self, *arguments, **keywords)

    return wrapped


def mean_output(outputs: Any) -> Tensor:
    """The predicted mean of a regression surrogate, one value an example.

    Args:
        outputs: (batch,) or (batch, 1); or a tuple whose first entry is that (a Gaussian head's mean and log-std).

    Returns:
        (batch,).

    Raises:
        TypeError: for anything else, naming what would be of use: `output_fn`.

    Example:
        >>> mean_output((torch.ones(4, 1), torch.zeros(4, 1))).shape
        torch.Size([4])
    """
    if isinstance(outputs, (tuple, list)) and outputs:
        outputs = outputs[0]
    if isinstance(outputs, Tensor) and (outputs.ndim == 1 or (outputs.ndim == 2 and outputs.shape[1] == 1)):
        return outputs.reshape(-1)
    found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
    raise TypeError(
        f"mean_output: the model must return (batch,), (batch, 1) or a tuple that begins with it, got {found}; "
        "give output_fn=, which makes (batch,) of what the model returns"
    )


def cut_inputs(inputs: Any, parts: int = 1) -> tuple[list[Any], list[int]]:
    """Inputs cut into at most `parts` micro-batches, and how many examples each holds.

    Raises:
        ValueError: for an empty batch.

    Example:
        >>> [len(part) for part in cut_inputs(torch.zeros(5, 2), 2)[0]]
        [2, 3]
    """
    size = batch_size(Batch(inputs, None))
    if size == 0:
        raise ValueError("surrogate sharpness: the batch is empty")
    parts = max(1, min(parts, size))
    bounds = [i * size // parts for i in range(parts + 1)]
    edges = list(zip(bounds[:-1], bounds[1:], strict=True))
    return [cut(inputs, size, start, stop) for start, stop in edges], [stop - start for start, stop in edges]


class MeanPrediction:
    """`h(w) = sum_j f_w(x_j) / B`, the mean prediction of one network on one batch, and its derivatives in w.

    Evaluations leave no trace: they work on copies of the buffers, all start from the same random state (one mask of
    dropout for all of them) and give it back, and run in float32 or wider, outside of autocast; weights in half
    precision are copied to float32 first, as a finite difference of bfloat16 gradients holds no digit.

    Args:
        network: the module.
        parts: inputs of each micro-batch and its share of the batch; one graph is alive at a time.
        output_fn: from the network's outputs to (batch,); `mean_output` by default.
        select: which parameters, by name; all that require a gradient by default.
        combine: sums a list of tensors over data-parallel ranks in place; None for one process.
        inspect: look for parts of the graph that a second derivative would silently miss.

    Raises:
        ValueError: if no parameter is left, or if `output_fn` does not return one value an example.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> h = MeanPrediction(network, [(torch.tensor([[1.0, 3.0], [3.0, 5.0]]), 1.0)])
        >>> h.gradient()
        [tensor([[2., 4.]]), tensor([1.])]
    """

    def __init__(
        self,
        network: nn.Module,
        parts: Sequence[Part],
        output_fn: OutputFunction | None = None,
        select: Callable[[str], bool] | None = None,
        combine: Callable[[list[Tensor]], None] | None = None,
        inspect: bool = True,
    ) -> None:
        self.network, self.parts, self.combine, self.inspect = network, parts, combine, inspect
        self.output_fn = mean_output if output_fn is None else output_fn
        named = {n: p for n, p in network.named_parameters() if p.is_floating_point() and (not select or select(n))}
        # Where a tuner swapped constants for all parameters, they stand for the trainable ones.
        trainable = {n: p for n, p in named.items() if p.requires_grad} or (
            {} if any(isinstance(p, nn.Parameter) for p in named.values()) else named
        )
        if not trainable:
            raise ValueError(
                f"surrogate sharpness: no parameter of {type(network).__name__} that requires a gradient is selected"
            )
        self.names = list(trainable)
        self.parameters: list[Tensor] = list(trainable.values())
        self.half = any(p.dtype in (torch.float16, torch.bfloat16) for p in network.parameters())
        self._values = self._wide_values() if self.half else None
        self._graph: list[Tensor | None] | None = None

    @in_full_precision
    def gradient(self, keep_graph: bool = False) -> list[Tensor]:
        """`dh/dw`, one detached tensor a parameter; zeros where h does not depend on it.

        Args:
            keep_graph: keep what `norm_gradient(..., "exact")` needs, where there is one micro-batch.
        """
        if keep_graph and len(self.parts) == 1:
            self._graph = self._first(*self.parts[0], create_graph=True)
            return self._combined([_dense(g, p) for g, p in zip(self._graph, self._leaves(), strict=True)])
        return self._combined(self._total(self._values))

    @in_full_precision
    def norm_gradient(
        self, gradient: Sequence[Tensor], curvature: Curvature = "exact", r: float = 0.05
    ) -> list[Tensor]:
        """The gradient of `||dh/dw||`: the Hessian of h times `g / ||g||`, for g = `gradient`, not all zero.

        Args:
            gradient: as `gradient()` returned it.
            curvature: "exact" (double backward), or "finite_difference": `(g(w + r g / ||g||) - g(w)) / r`.
            r: distance of the probe.

        Raises:
            RuntimeError: with a hint, if the network cannot be differentiated twice.
        """
        norm = global_norm(gradient)
        if curvature == "exact":
            direction = list(torch._foreach_div(list(gradient), norm.to(gradient[0])))
            return self._combined(self._double_backward(direction))
        values = self._values or {n: p.detach() for n, p in zip(self.names, self.parameters, strict=True)}
        scale = r / norm
        moved = {
            n: (values[n].detach() + g * scale.to(g)).requires_grad_()
            for n, g in zip(self.names, gradient, strict=True)
        }
        probe = self._combined(self._total({**values, **moved}))
        return [(after - before) / r for after, before in zip(probe, gradient, strict=True)]

    @in_full_precision
    def norm(self) -> Tensor:
        """`||dh/dw||` as a scalar that can be differentiated again, in w and in whatever else h depends on."""
        leaves = self._leaves()
        total: list[Tensor] = [torch.zeros_like(p) for p in leaves]
        for part in self.parts:
            found = self._first(*part, create_graph=True)
            total = [t if g is None else t + g for t, g in zip(total, found, strict=True)]
        squares = torch.stack([t.square().sum() for t in total]).sum()
        # At 0 the norm has no gradient; it gets 0 and not nan.
        return torch.where(squares > 0, squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt(), 0.0)

    @in_full_precision
    def value(self, values: Mapping[str, Tensor] | None, inputs: Any) -> Tensor:
        """Mean prediction on one micro-batch, at `values` of (some) parameters or at the network's own."""
        with (
            copied_buffers(self.network),
            forked_rng(self.network),
            torch.enable_grad(),
            collect_records(),
        ):
            if values is None:
                outputs = call_model(self.network, inputs)
            else:
                inputs = map_tensors(_widened, inputs) if self.half else inputs
                keywords = dict(inputs) if isinstance(inputs, Mapping) else {}
                arguments = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
                outputs = functional_call(self.network, dict(values), () if keywords else arguments, keywords)
        predictions = self.output_fn(outputs)
        size = batch_size(Batch(inputs, None))
        if predictions.shape != (size,):
            raise ValueError(
                f"surrogate sharpness: output_fn must return one value for each of the {size} examples, got shape "
                f"{tuple(predictions.shape)}"
            )
        return predictions.mean()

    def _leaves(self) -> list[Tensor]:
        return list(self.parameters) if self._values is None else [self._values[name] for name in self.names]

    def _wide_values(self) -> dict[str, Tensor]:
        found = {n: _widened(p.detach()) for n, p in self.network.named_parameters()}
        for name in self.names:
            found[name] = found[name].requires_grad_()
        return {**found, **{n: _widened(b) for n, b in self.network.named_buffers()}}

    def _first(self, inputs: Any, share: float, create_graph: bool) -> list[Tensor | None]:
        values = self._values
        if values is None and not all(p.requires_grad for p in self.parameters):
            values = {n: p.detach().requires_grad_() for n, p in zip(self.names, self.parameters, strict=True)}
        leaves = self.parameters if values is None else [values[name] for name in self.names]
        mean = self.value(values, inputs) * share
        if not mean.requires_grad:
            return [None] * len(leaves)
        found: list[Tensor | None] = list(
            torch.autograd.grad(mean, leaves, create_graph=create_graph, allow_unused=True)
        )
        if create_graph and self.inspect:
            self.inspect = False
            if once_differentiable(found):
                raise RuntimeError(
                    f"surrogate sharpness: {type(self.network).__name__} cannot be differentiated twice (a function of "
                    "it is marked once_differentiable); use hvp='finite_difference'"
                )
        return found

    def _total(self, values: Mapping[str, Tensor] | None) -> list[Tensor]:
        leaves = self.parameters if values is None else [values[name] for name in self.names]
        total: list[Tensor] | None = None
        for inputs, share in self.parts:
            mean = self.value(values, inputs) * share
            found = torch.autograd.grad(mean, leaves, allow_unused=True) if mean.requires_grad else [None] * len(leaves)
            dense = [_dense(g, p) for g, p in zip(found, leaves, strict=True)]
            total = dense if total is None else list(torch._foreach_add(total, dense))
        assert total is not None
        return total

    def _double_backward(self, direction: Sequence[Tensor]) -> list[Tensor]:
        leaves = self._leaves()
        total: list[Tensor | None] = [None] * len(leaves)
        for part in self.parts:
            graph = self._graph if self._graph is not None else self._first(*part, create_graph=True)
            # What enters h linearly (an output bias) has a gradient without a graph, and adds nothing.
            curved = [(g, d) for g, d in zip(graph, direction, strict=True) if g is not None and g.requires_grad]
            if not curved:
                continue
            first, cotangents = zip(*curved, strict=True)
            try:
                found = torch.autograd.grad(first, leaves, cotangents, allow_unused=True)
            except RuntimeError as error:
                raise RuntimeError(
                    f"surrogate sharpness: {type(self.network).__name__} cannot be differentiated twice "
                    f"({str(error).splitlines()[0]}); use hvp='finite_difference'"
                ) from error
            total = [v if t is None else t if v is None else t + v for t, v in zip(total, found, strict=True)]
        self._graph = None
        return [_dense(t, p) for t, p in zip(total, leaves, strict=True)]

    def _combined(self, tensors: list[Tensor]) -> list[Tensor]:
        if self.combine is not None:
            self.combine(tensors)
        return tensors


def once_differentiable(gradients: Sequence[Tensor | None]) -> bool:
    """Whether the graph of these gradients has error nodes, which autograd walks past in a second derivative.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> once_differentiable(torch.autograd.grad(x.exp().sum(), [x], create_graph=True))
        False
    """
    waiting = [g.grad_fn for g in gradients if g is not None and g.grad_fn is not None]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            if "Error" in node.name():
                return True
            waiting.extend(following for following, _ in node.next_functions if following is not None)
    return False


def _dense(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient.detach()


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

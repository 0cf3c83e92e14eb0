"""`Regularizer`: the hooks by which a method acts in a training step, and what it requires of the loop."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn

from .step import Step

HOOKS = (
    "attach",
    "parameter_groups",
    "on_batch",
    "loss",
    "penalty",
    "on_backward",
    "on_gradients",
    "on_step",
    "on_epoch",
    "finish",
)
"""The hooks, in the order in which a training run calls them."""

REQUIREMENTS: dict[str, str] = {
    "index": (
        "each example's position in the data set:\n"
        "    from wellposed import IndexedDataset\n"
        "    loader = DataLoader(IndexedDataset(dataset), batch_size=64, shuffle=True)\n"
        "    for inputs, targets, index in loader: ..."
    ),
    "validation": (
        "validation data:\n"
        "    from wellposed import fit\n"
        "    train, validation = torch.utils.data.random_split(dataset, [0.8, 0.2])\n"
        "    fit(model, train, validation=validation, regularizer=..., epochs=...)"
    ),
    "closure": (
        "a loop that can evaluate the batch again:\n"
        "    from wellposed import fit\n"
        "    fit(model, dataset, regularizer=..., epochs=...)\n"
        "    # in your own loop: wellposed.Accumulation holds the batch and its closure"
    ),
    "gradients": (
        "a call between backward and clipping:\n"
        "    loss.backward()\n"
        "    regularizer.on_gradients(step)\n"
        "    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0); optimizer.step()"
    ),
    "optimizer": (
        "the optimizer in the step:\n"
        "    optimizer = torch.optim.AdamW(model.parameters())\n"
        "    step = Step(model, optimizer, inputs, targets, index)\n"
        "    regularizer.on_step(step)"
    ),
    "double_backward": (
        "a model that can be differentiated twice:\n"
        "    from torch.nn.attention import SDPBackend, sdpa_kernel\n"
        "    with sdpa_kernel(SDPBackend.MATH):\n"
        "        fit(model, dataset, regularizer=..., epochs=...)"
    ),
}
"""What a method may require of a loop, and the lines that provide it."""


class RequirementError(ValueError):
    """A loop does not provide what a method requires."""


class Regularizer(nn.Module):
    """A method that acts in a training step. Every hook does nothing unless overridden.

    Override the hooks where the method acts; each but `attach`, `parameter_groups` and `finish` gets the `Step`.
    `loss` and `penalty` are pure: they read state and never write it, so that sharpness-aware steps,
    Hessian-vector products and tuners may evaluate them any number of times. State is written in the `on_*` hooks
    and kept in buffers (or by `get_extra_state`), so that `state_dict` is all that an exact resume needs.

    Class attributes:
        requires: subset of `REQUIREMENTS` that the loop must provide.
        coupled: whether terms couple the examples of a batch (a ranking, a covariance), so that cutting the batch
            into micro-batches changes them; the loop then warns under accumulation.
        pairs_batch: whether `on_batch` gives each network of a `Pair` inputs, targets and positions of its own
            (`Paired`); other methods that rewrite the batch must come before, which `Compose` checks.
        needs_base_weights: whether the method must train the model's own weights, so that it is refused where adapters
            alone train.

    Example:
        >>> class Shrink(Regularizer):
        ...     "Half the squared norm of all parameters, times `strength`."
        ...     def __init__(self, strength):
        ...         super().__init__()
        ...         self.strength = strength
        ...     def penalty(self, step):
        ...         return 0.5 * self.strength * sum(p.square().sum() for p in step.model.parameters())
        >>> float(Shrink(2.0).penalty(Step(nn.Linear(1, 1, bias=False).requires_grad_(False)))) >= 0
        True
    """

    requires: frozenset[str] = frozenset()
    coupled: bool = False
    pairs_batch: bool = False
    needs_base_weights: bool = False

    def attach(self, model: nn.Module) -> nn.Module:
        """Replace, parametrise or pair modules; called once, before the optimizer is built."""
        return model

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Wishes about optimizer groups; see `wellposed.parameters.parameter_groups`."""
        return []

    def on_batch(self, step: Step) -> None:
        """Rewrite inputs, targets, index, weights; once per optimizer step, before the batch is cut."""

    def loss(self, step: Step) -> Tensor | None:
        """REPLACE the task loss: (batch,) or (batch, length), unreduced. Pure."""
        return None

    def penalty(self, step: Step) -> Tensor | list[Tensor] | None:
        """ADD to the loss: (batch,), (batch, length) or a scalar, or several such terms as a list. Pure."""
        return None

    def on_backward(self, step: Step) -> None:
        """Write per-example state; once per micro-batch after its first backward pass, never in a re-evaluation."""

    def on_gradients(self, step: Step) -> None:
        """Rewrite `.grad`, call `step.closure()`; after unscaling and all-reduce, before clipping."""

    def on_step(self, step: Step) -> None:
        """Project, average, dual step; after the optimizer's step, not when a scaler skipped it."""

    def on_epoch(self, step: Step) -> None:
        """Schedules and validation; at the start of each epoch, and once at the end (`step.finished`)."""

    def finish(self, model: nn.Module) -> nn.Module:
        """Return a plain model: fold, merge, export; once, after training."""
        return model

    @property
    def acts_in(self) -> frozenset[str]:
        """The hooks in which this method acts: those that it overrides, unless an argument switches one of them off."""
        return frozenset(hook for hook in HOOKS if getattr(type(self), hook) is not getattr(Regularizer, hook))

    @property
    def replaces_loss(self) -> bool:
        """Whether this method replaces the task loss; at most one in a `Compose` may."""
        return type(self).loss is not Regularizer.loss


def check_requirements(regularizer: Regularizer, provides: Collection[str], loop: str) -> None:
    """Raise unless `loop` provides what `regularizer` requires.

    Raises:
        RequirementError: naming both sides, with the lines that mend it.

    Example:
        >>> check_requirements(Regularizer(), provides=[], loop="fit")
    """
    for part in leaves([regularizer]):
        for need in sorted(part.requires):
            if need not in REQUIREMENTS:
                raise ValueError(f"{type(part).__name__}.requires: unknown {need!r}; allowed: {sorted(REQUIREMENTS)}")
            if need not in provides:
                raise RequirementError(
                    f"{type(part).__name__} requires {need!r}, which {loop} does not provide here. It needs "
                    f"{REQUIREMENTS[need]}"
                )


def leaves(regularizers: Iterable[Regularizer]) -> list[Regularizer]:
    """The methods themselves, with every `Compose` taken apart, in order."""
    found: list[Regularizer] = []
    for regularizer in regularizers:
        inner = getattr(regularizer, "regularizers", None)
        found.extend(leaves(inner) if inner is not None else [regularizer])
    return found

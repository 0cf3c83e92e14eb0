"""The spectral penalty as a method: what it sees of a batch, the basis of a frozen head, decompositions that fail."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..batching import unwrap
from ..hyperparameter import Hyperparameter
from ..step import Step, record
from .logit_rows import valid_rows
from .logit_spectrum import (
    Method,
    Norm,
    check_spectrum,
    head_factor,
    logits_in_head_basis,
    spectral_concentration,
)
from .logit_terms import LogitTerm, Per, check_per
from .shared_rows import Rows, rows_of
from .strength_schedule import Factor, Schedule

_HIDDEN = "spectral concentration: hidden"


class SpectralConcentration(LogitTerm):
    """BA-LoRA's spectral term alone: the leading singular values of a batch's logit matrix get more of it (arXiv 2408.04556).

    A statistic of the micro-batch, on all ranks together. With the nuclear norm and k >= min(rows, classes), as on tasks
    of two or three classes, it is constant; a warning says so.

    Args:
        strength: weight, >= 0; a float or a `Hyperparameter`.
        k: leading singular values.
        norm, method, seed: see `spectral_concentration`.
        head: name of the frozen output layer (e.g. "lm_head"): the spectrum is then taken in the basis of its features,
            which is exact and many times faster for a large vocabulary.
        per: of sequences: "token", one row for each valid token; "sequence", one row for each sequence, its tokens' logits
            side by side (ranks whose sequences are shorter fill up on the right).
        schedule: see `LogitTerm`.

    Raises:
        ValueError: for an argument out of range; at `attach`, for a head that is missing, trains, or is no linear layer;
            in use, if the logits are not its outputs (they were capped or scaled).

    Attributes:
        failures: how often the decomposition failed, and the term counted as 0.

    Example:
        >>> z = torch.diag(torch.tensor([3.0, 1.0]))
        >>> SpectralConcentration(2.0, k=1).penalty(Step(nn.Identity(), outputs=z))
        tensor(-1.5000)
    """

    coupled = True
    failures: Tensor
    factor: Tensor | None

    def __init__(
        self,
        strength: float | Hyperparameter = 0.03,
        *,
        k: int = 5,
        norm: Norm = "nuclear",
        method: Method = "auto",
        head: str | None = None,
        per: Per = "token",
        schedule: Schedule | Factor = "constant",
        seed: int = 0,
    ) -> None:
        super().__init__(strength, schedule)
        check_spectrum("SpectralConcentration", k, norm, method)
        check_per("SpectralConcentration", per)
        if head is not None and per == "sequence":
            raise ValueError(
                "SpectralConcentration: head needs rows of single tokens: per must be 'token', got 'sequence'"
            )
        self.k, self.norm, self.method, self.head, self.per, self.seed = k, norm, method, head, per, seed
        self.register_buffer("failures", torch.zeros((), dtype=torch.int64))
        self.register_buffer("factor", None, persistent=False)
        self._hook: RemovableHandle | None = None
        self._checked = self._warned = self._failed = False

    def attach(self, model: nn.Module) -> nn.Module:
        if self.head is None:
            return model
        layer = _find_head(model, self.head)
        self.factor = head_factor(layer.weight, layer.bias)
        self._hook = layer.register_forward_pre_hook(_record_input)
        self._checked = False
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        return model

    def term(
        self, logits: Tensor, valid: Tensor | None = None, hidden: Tensor | None = None, step: Step | None = None
    ) -> Tensor:
        """The term without its strength, a scalar; `hidden` are the inputs of the head, if its basis is to be used.
        `step` tells whether other ranks have a share of the batch.

        Raises:
            torch.linalg.LinAlgError: where the decomposition fails.
        """
        if self.per == "sequence" and logits.ndim == 3:
            matrix = (logits if valid is None else torch.where(valid[..., None], logits, 0.0)).flatten(1)
        elif hidden is not None and self.factor is not None:
            matrix = logits_in_head_basis(valid_rows(hidden, valid), self.factor)
        else:
            matrix = valid_rows(logits, valid)
        where = Rows() if step is None else rows_of("SpectralConcentration", matrix, step)
        rows = where.count(matrix)
        least = min(rows, logits.shape[-1])
        if self.norm == "nuclear" and 1 < least <= self.k and not self._warned:
            self._warned = True
            warnings.warn(
                f"SpectralConcentration: with k={self.k} and logits of {rows} rows and {logits.shape[-1]} classes the "
                "term is constant and its gradient 0; choose a smaller k, or leave it out"
            )
        return spectral_concentration(where.widen(matrix), self.k, self.norm, self.method, self.seed, where)

    def penalty(self, step: Step) -> Tensor | None:
        self._failed = False
        if self.is_off(step.progress):
            return None
        hidden = None if self.factor is None else self._recorded(step)
        try:
            return self.term(step.logits, step.valid, hidden, step) * self.weight(step.progress)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            self._failed = True  # written down in `on_backward`: a penalty may be evaluated any number of times
            return None

    def on_backward(self, step: Step) -> None:
        self.failures += int(self._failed)

    def _recorded(self, step: Step) -> Tensor:
        found = step.records.get(_HIDDEN)
        if not found:
            raise ValueError(
                f"SpectralConcentration: the forward pass did not run through head {self.head!r}; leave head out"
            )
        hidden, logits = found[-1], step.logits
        if not self._checked:
            layer = _find_head(step.model, str(self.head))
            with torch.no_grad():
                row = hidden.reshape(-1, hidden.shape[-1])[:1]
                expected = F.linear(row, layer.weight.to(row), None if layer.bias is None else layer.bias.to(row))
            shapes = hidden.shape[:-1] == logits.shape[:-1] and expected.shape[-1] == logits.shape[-1]
            actual = logits.detach().reshape(-1, logits.shape[-1])[:1].to(row)
            if not shapes or not torch.allclose(actual, expected, rtol=0.02, atol=0.02 * float(expected.abs().max())):
                raise ValueError(
                    f"SpectralConcentration: the logits are not the outputs of head {self.head!r} (capped or scaled "
                    "afterwards, or other positions); leave head out"
                )
            self._checked = True
        return hidden


def _record_input(module: nn.Module, args: tuple[Any, ...]) -> None:
    record(_HIDDEN, args[0])


def _find_head(model: nn.Module, head: str) -> nn.Linear:
    found = [(name, m) for name, m in unwrap(model).named_modules() if name == head or name.endswith(f".{head}")]
    if len(found) != 1:
        raise ValueError(
            f"SpectralConcentration: head must name one layer of the model, but {len(found)} are called {head!r}"
        )
    name, layer = found[0]
    # Subclasses may compute something else (quantised layers, adapters around a layer).
    if type(layer) is not nn.Linear:
        raise ValueError(f"SpectralConcentration: head {name!r} must be a plain nn.Linear, got {type(layer).__name__}")
    if any(p.requires_grad for p in layer.parameters()):
        raise ValueError(f"SpectralConcentration: head {name!r} trains, so that its basis changes; leave head out")
    return layer

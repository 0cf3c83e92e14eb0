"""Where a model's class logits and their targets are found, when it returns more than one thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..step import Step


@dataclass(frozen=True)
class ClassificationHead:
    """One classification head of a model, such as the class branch of a detector.

    Attributes:
        output_key: name of the class logits among the outputs (entry of a dict, or attribute); None takes the outputs
            themselves, or their `logits`.
        target_key: name of the class targets in a dict of targets; None takes the targets themselves.

    Example:
        >>> head = ClassificationHead("cls_logits", "labels")
        >>> head.logits({"cls_logits": torch.zeros(1, 2, 3), "boxes": torch.zeros(1, 2, 4)}).shape
        torch.Size([1, 2, 3])
        >>> sorted(head.replaced({"labels": torch.zeros(1, 2), "boxes": torch.zeros(1, 2, 4)}, torch.ones(1)))
        ['boxes', 'labels']
    """

    output_key: str | None = None
    target_key: str | None = None

    def logits(self, outputs: Any) -> Tensor:
        """The class logits among `outputs`, at least float32 (probabilities of half precision would be coarse).

        Raises:
            TypeError: if the outputs hold no such tensor.
        """
        if isinstance(outputs, Tensor) and self.output_key is None:
            found: Any = outputs
        elif self.output_key is None:
            found = Step(torch.nn.Identity(), outputs=outputs).logits
        elif isinstance(outputs, Mapping):
            found = outputs.get(self.output_key)
        else:
            found = getattr(outputs, self.output_key, None)
        if not isinstance(found, Tensor):
            held = sorted(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
            raise TypeError(f"output_key: the model's outputs hold no tensor {self.output_key!r}; they are {held}")
        return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found

    def targets(self, targets: Any) -> Tensor:
        """The class targets among `targets`.

        Raises:
            TypeError: if the targets hold no such tensor.
        """
        found = targets if self.target_key is None else targets.get(self.target_key)
        if not isinstance(found, Tensor):
            held = sorted(targets) if isinstance(targets, Mapping) else type(targets).__name__
            raise TypeError(f"target_key: the targets hold no tensor {self.target_key!r}; they are {held}")
        return found

    def replaced(self, targets: Any, soft: Tensor) -> Any:
        """`targets` with `soft` in the place of the class targets; a dict is copied, not changed."""
        return soft if self.target_key is None else {**targets, self.target_key: soft}

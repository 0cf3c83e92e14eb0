"""Half fine-tuning (HFT): in every stage a random half of each layer's matrices stays where it is, the other half trains."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from ..batching import unwrap
from ..hyperparameter import refuse_hyperparameter
from ..regularizer import Regularizer
from ..step import Step
from .element_mask import FrozenEntries
from .half_discovery import Unit, discover
from .half_fused import split_fused
from .half_optimizer import hand_over
from .half_report import MaskReport, report
from .half_selection import Balance, Mask, Strategy, draw_frozen, draw_generator, element_mask, masks_of

STRATEGIES = ("category", "layer", "model", "element")
ALWAYS = ("embed", "lm_head", "norm_f")


class HalfFineTuning(Regularizer):
    """Half fine-tuning, HFT (Hui et al., ACL 2025, arXiv 2404.18466): freeze a random half of every layer in each stage.

    A stage is one `fit`: `attach` draws the half, `finish` sets every tensor free again, and the next `fit` with the same
    object draws another half. In a loop of your own, call `new_stage(model)` and build the optimizer after it. Frozen
    tensors have no gradient and no optimizer state; they keep their values bit for bit.

    It acts like full fine-tuning at a lower learning rate: compare at equal learning on the new task, and try
    `WeightInterpolation` (WiSE-FT) beside it.

    Args:
        ratio: share to freeze, in [0, 1].
        strategy: "category": in every layer 2 of 4 attention matrices, 1 or 2 of 3 feed-forward matrices (each in half of
            the layers), 1 of 2 norms; "layer": whole layers; "model": matrices wherever they are; "element": single
            scalars, which saves no memory.
        trainable_always: what is never frozen: "embed", "lm_head", "norm_f" mean embeddings, all else outside of the layers,
            and norms outside; other texts are parts of parameter names.
        groups: lists of parameter or module names in place of the discovery by names; from each a share is frozen.
        balance: of "category": "modules" counts matrices as the paper does; "params" counts scalars, for grouped-query
            attention, whose key and value matrices are small, and for fused matrices, of which it freezes blocks of rows.
        seed: of the draws, with the number of the stage.
        resample: draw a new half in every "stage", "epoch", or so many optimizer steps.
        keep_optimizer_state: a tensor that trains again after a pause goes on with its old momentum; by default it starts
            anew. Only within a stage.

    Attributes:
        stage: number of the next draw.

    Raises:
        ValueError: for an argument out of range; from `attach`, if no layer is found, nothing would train, matrices are fused
            under strategy "category" with balance "modules", or the model trains adapters.
        RuntimeError: from `new_stage`, under data parallelism or with gradients present.

    Example:
        >>> block = lambda: nn.ModuleDict({n: nn.Linear(2, 2, bias=False) for n in ("q_proj", "k_proj", "v_proj", "o_proj")})
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([block(), block()])})
        >>> method = HalfFineTuning(seed=1)
        >>> print(method.new_stage(model))
        stage 0                units frozen     parameters   frozen
        attention                  8      4             32   50.0 %
        trainable scalars in all: 16
        >>> import torch
        >>> optimizer = torch.optim.AdamW(method.trainable_parameters())
        >>> sum(p.requires_grad for p in model.parameters())
        4
    """

    needs_base_weights = True

    def __init__(
        self,
        ratio: float = 0.5,
        strategy: Strategy = "category",
        *,
        trainable_always: Collection[str] = ALWAYS,
        groups: Sequence[Sequence[str]] | None = None,
        balance: Balance = "modules",
        seed: int = 0,
        resample: Literal["stage", "epoch"] | int = "stage",
        keep_optimizer_state: bool = False,
    ) -> None:
        super().__init__()
        refuse_hyperparameter(
            "HalfFineTuning", "ratio", ratio, "what is frozen is drawn, so that no tuner can learn it"
        )
        _check(ratio, strategy, balance, resample, trainable_always)
        self.ratio, self.strategy, self.balance, self.seed = float(ratio), strategy, balance, seed
        self.trainable_always = tuple(trainable_always)
        self.groups = None if groups is None else tuple(tuple(group) for group in groups)
        self.resample, self.keep_optimizer_state = resample, keep_optimizer_state
        if resample != "stage":
            self.requires = frozenset({"optimizer"})
        self.stage = 0
        self._masks: Mask = {}
        self._held: tuple[nn.Module, tuple[str, ...]] | None = None  # a tuple: the model is no part of this module
        self._entries: FrozenEntries | None = None
        self._hooks: list[Any] = []
        self._shelf: dict[str, Any] = {}

    # ── a loop of one's own ───────────────────────────────────────────────────────────────────────────────────────
    def new_stage(self, model: nn.Module, optimizer: Optimizer | None = None, force: bool = False) -> MaskReport:
        """Draw the next half and freeze it.

        Args:
            model: the bare model, before it is wrapped for data parallelism.
            optimizer: one that goes on: newly frozen tensors leave it with their state, newly trained ones enter it. Under
                strategy "element", or with blocks of fused matrices, it also gets hooks that keep frozen entries where they
                are; without it call `mask_gradients` and `restore` around its steps.
            force: even if gradients are present (they are cleared where a tensor is frozen).

        Returns:
            What is frozen, as a table.

        Raises:
            RuntimeError: for a wrapped model, or gradients of a step that is not finished.
            ValueError: see the class.
            TypeError: for an optimizer that holds tensors to freeze and cannot let them go.
        """
        _refuse_wrapped(model)
        model = unwrap(model)
        held = [name for name, p in model.named_parameters() if p.grad is not None]
        if held and not force:
            raise RuntimeError(
                f"HalfFineTuning.new_stage: {held[0]!r} holds a gradient: finish the step and call "
                "optimizer.zero_grad(set_to_none=True) first, or pass force=True"
            )
        return self._begin(model, optimizer, hooks=True)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimizer of this stage gets.

        Raises:
            RuntimeError: before the first stage, or after `finish`.
        """
        return [p for p in self._model("trainable_parameters").parameters() if p.requires_grad]

    def mask(self) -> dict[str, bool | Tensor]:
        """By parameter name, what trains in the last stage that was drawn: True, False, or a bool tensor of its shape.

        Tied tensors appear once. After `finish` it still tells the last stage, as `half_reset` wants it.
        """
        return dict(self._masks)

    def mask_gradients(self) -> None:
        """Zero the gradients of frozen entries, before clipping; nothing to do where whole tensors are frozen."""
        if self._entries is not None:
            self._entries.mask_gradients()

    def restore(self) -> None:
        """Put frozen entries back after a step; nothing to do where whole tensors are frozen."""
        if self._entries is not None:
            self._entries.restore()

    # ── hooks ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def attach(self, model: nn.Module) -> nn.Module:
        _refuse_wrapped(model)
        self._shelf = {}
        # Gradients here are leftovers of another run: no step is under way.
        self._begin(unwrap(model), None, hooks=False)
        return model

    def on_gradients(self, step: Step) -> None:
        self.mask_gradients()

    def on_step(self, step: Step) -> None:
        self.restore()
        if isinstance(self.resample, int) and (step.number + 1) % self.resample == 0 and step.number + 1 < step.total:
            self._resample(step)

    def on_epoch(self, step: Step) -> None:
        if self.resample != "stage":
            _refuse_wrapped(step.model)  # at the first epoch, before any work is lost
        if self.resample == "epoch" and step.epoch > 0 and not step.finished:
            self._resample(step)

    def finish(self, model: nn.Module) -> nn.Module:
        self._release(unwrap(model))
        self._unhook()
        self._held, self._entries, self._shelf = None, None, {}
        return model

    # ── inside ────────────────────────────────────────────────────────────────────────────────────────────────────
    def _resample(self, step: Step) -> None:
        if step.optimizer is None:
            raise RuntimeError("HalfFineTuning: step.optimizer is missing; it must let go of what is frozen")
        self._begin(unwrap(step.model), step.optimizer, hooks=False)

    def _begin(self, model: nn.Module, optimizer: Optimizer | None, hooks: bool) -> MaskReport:
        self._release(model)
        units = self._units(model)
        self._freeze(model, self._draw(model, units, self.stage), optimizer, hooks)
        self.stage += 1
        return self._report(model, units)

    def _units(self, model: nn.Module) -> list[Unit]:
        adapters = next((name for name, m in model.named_modules() if hasattr(m, "lora_A")), None)
        if adapters is not None:
            raise ValueError(
                f"HalfFineTuning: the model trains adapters ({adapters!r} holds lora_A): half fine-tuning freezes half of "
                "the matrices themselves; merge the adapters first (merge_low_rank, merge_and_unload), or leave it out"
            )
        units = discover(model, self.groups, self.trainable_always)
        if self.strategy == "category":
            fused = next((unit for unit in units if unit.fused > 1), None)
            if fused is not None and self.balance == "modules":
                raise ValueError(
                    f"HalfFineTuning: {fused.name!r} fuses {fused.fused} matrices, of which strategy='category' with "
                    "balance='modules' cannot freeze some; use balance='params', which freezes blocks of its rows, or "
                    "strategy='layer', 'model' or 'element'"
                )
            shapes = cast(dict[str, Tensor], dict(model.named_parameters()))
            units = split_fused(units, shapes, _transposed(model))
        return units

    def _draw(self, model: nn.Module, units: Sequence[Unit], stage: int) -> Mask:
        generator = draw_generator(self.seed, stage)
        shapes = cast(dict[str, Tensor], dict(model.named_parameters()))
        if self.strategy == "element":
            names = [piece.name for unit in units if unit.category != "other" for piece in unit.pieces]
            drawn: Mask = {name: element_mask(shapes[name].shape, self.ratio, generator) for name in names}
            masks: Mask = {name: m if cast(Tensor, m).any() else False for name, m in drawn.items()}
        else:
            masks = masks_of(draw_frozen(units, self.ratio, self.strategy, self.balance, generator), shapes)
        if not any(masks.get(name) is not False for name, p in model.named_parameters() if p.requires_grad):
            raise ValueError(
                f"HalfFineTuning: ratio={self.ratio} with trainable_always={self.trainable_always} leaves nothing to train"
            )
        return masks

    def _freeze(self, model: nn.Module, masks: Mask, optimizer: Optimizer | None, hooks: bool) -> None:
        named = dict(model.named_parameters())
        free = tuple(name for name, p in named.items() if p.requires_grad)
        trained = [name for name in free if masks.get(name) is not False]
        frozen = [name for name in free if masks.get(name) is False]
        if optimizer is not None:
            hand_over(model, optimizer, trained, frozen, self._shelf if self.keep_optimizer_state else None)
        for name in frozen:
            named[name].requires_grad_(False)
            # A gradient left behind would let weight decay move the tensor, also under zero_grad(set_to_none=False).
            named[name].grad = None
        partial = {name: m for name, m in masks.items() if isinstance(m, Tensor) and not bool(m.all())}
        self._masks = {name: masks.get(name, True) if name in free else False for name in named}
        self._held = (model, free)
        self._entries = FrozenEntries(named, partial) if partial else None
        self._unhook()
        if hooks and self._entries is not None and hasattr(optimizer, "register_step_post_hook"):
            assert optimizer is not None
            entries = self._entries
            self._hooks = [
                optimizer.register_step_pre_hook(lambda *_: entries.mask_gradients()),
                optimizer.register_step_post_hook(lambda *_: entries.restore()),
            ]

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _release(self, model: nn.Module) -> None:
        """Set free what the last stage froze, and nothing that the user had frozen before."""
        if self._held is not None and self._held[0] is model:
            named = dict(model.named_parameters())
            for name in self._held[1]:
                if name in named:
                    named[name].requires_grad_(True)

    def _report(self, model: nn.Module, units: Sequence[Unit]) -> MaskReport:
        trainable = 0
        for name, p in model.named_parameters():
            mask = self._masks[name]
            trainable += int(mask.sum()) if isinstance(mask, Tensor) else p.numel() * mask
        return report(self.stage - 1, units, self._masks, trainable, self.strategy != "layer")

    def _model(self, asking: str) -> nn.Module:
        if self._held is None:
            raise RuntimeError(f"HalfFineTuning.{asking}: no stage is under way; call new_stage(model) first")
        return self._held[0]

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to another loop: it must not carry model and optimizer along.
        return {**self.__dict__, "_held": None, "_entries": None, "_hooks": [], "_shelf": {}}

    # ── state ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def get_extra_state(self) -> dict[str, Any]:
        """What an exact resume needs; masks of single entries are drawn again from seed and stage."""
        frozen = [name for name, mask in self._masks.items() if mask is False]
        return {
            "seed": self.seed, "stage": self.stage, "strategy": self.strategy, "ratio": self.ratio, "frozen": frozen,
            "shelf": self._shelf,
        }  # fmt: skip

    def set_extra_state(self, state: Any) -> None:
        """Continue from `get_extra_state`: the next draw is the one that would have come, and a model that is attached
        gets the saved stage's half.

        Raises:
            ValueError: if the state belongs to other arguments.
        """
        for name in ("seed", "strategy", "ratio"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"HalfFineTuning: the saved state has {name}={state[name]!r}, not {getattr(self, name)!r}"
                )
        self.stage, self._shelf = state["stage"], state["shelf"]
        if self._held is not None and self.stage > 0:
            model = self._held[0]
            self._release(model)
            self._freeze(model, self._draw(model, self._units(model), self.stage - 1), None, hooks=False)


def _check(ratio: Any, strategy: Any, balance: Any, resample: Any, always: Any) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0.0 <= ratio <= 1.0:
        raise ValueError(f"HalfFineTuning: ratio must be a number in [0, 1], got {ratio!r}")
    if strategy not in STRATEGIES:
        raise ValueError(f"HalfFineTuning: strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if balance not in ("modules", "params"):
        raise ValueError(f"HalfFineTuning: balance must be 'modules' or 'params', got {balance!r}")
    steps = isinstance(resample, int) and not isinstance(resample, bool) and resample >= 1
    if not steps and resample not in ("stage", "epoch"):
        raise ValueError(f"HalfFineTuning: resample must be 'stage', 'epoch' or an integer >= 1, got {resample!r}")
    if isinstance(always, str):
        raise ValueError(f"HalfFineTuning: trainable_always must be a list of texts, got the text {always!r}")


def _refuse_wrapped(model: nn.Module) -> None:
    kind = type(model).__name__
    if (
        isinstance(model, nn.parallel.DistributedDataParallel)
        or kind.startswith("FSDP")
        or hasattr(model, "_fsdp_wrapped_module")
    ):
        raise RuntimeError(
            f"HalfFineTuning: the model is wrapped in {kind}, which reduces only the tensors that were trainable when it "
            "wrapped the model; one that is set free later would train on each rank's own gradients. Call new_stage on the "
            "bare model and wrap it anew; in fit use resample='stage'"
        )


def _transposed(model: nn.Module) -> set[str]:
    """Weights stored (inputs, outputs): those of GPT-2's `Conv1D`."""
    layers = {name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    return {f"{name}.weight" for name in layers}

"""Half fine-tuning in a plain `transformers.Trainer`: the one method whose work is done before the optimizer exists."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..batching import unwrap
from ..weights.half_fine_tuning import HalfFineTuning
from .peft_models import check_base_weights

_NAME = "HalfFineTuningCallback"


class HalfFineTuningCallback(TrainerCallback, ExportableState):
    """Half fine-tuning (arXiv 2404.18466) as a callback of `transformers.Trainer`, TRL's trainers, or any subclass.

    The half is drawn at the end of the trainer's constructor, so that its optimizer never holds a frozen tensor, and
    set free at the end of `train()`. A stage is one trainer: give a callback of the same `HalfFineTuning` to the next.
    The steps are those of `RegularizedTrainer`, which takes every method and every option of this one; a callback sees
    neither losses nor unclipped gradients.

    Args:
        method: draws the halves; whole tensors, one half a stage.

    Raises:
        TypeError: for another method.
        ValueError: for `resample` other than "stage" or strategy "element"; from the trainer's constructor, under FSDP
            or DeepSpeed, for an optimizer that is already built, fused matrices of which blocks are to be frozen, a
            model under PEFT, `restore_callback_states_from_checkpoint`; from `train`, if the optimizer holds frozen
            tensors, or the checkpoint is one of another half.
        RuntimeError: from `train`, if the trainer's model is not the one whose half was drawn.

    Example:
        >>> import tempfile, transformers
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes))
        >>> rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 8
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     arguments = transformers.TrainingArguments(folder, num_train_epochs=1, report_to=[], disable_tqdm=True)
        ...     method = HalfFineTuning()
        ...     callback = HalfFineTuningCallback(method)
        ...     trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
        ...     result = trainer.train()  # doctest: +ELLIPSIS
        {...}
        >>> sum(not trained for trained in method.mask().values())  # of 2 layers: 4 of 8, 3 of 6 and 2 of 4
        9
    """

    def __init__(self, method: HalfFineTuning) -> None:
        if not isinstance(method, HalfFineTuning):
            raise TypeError(
                f"{_NAME}: method must be a HalfFineTuning, got {type(method).__name__}; RegularizedTrainer takes any "
                "method"
            )
        if method.resample != "stage":
            raise ValueError(
                f"{_NAME}: resample must be 'stage', got {method.resample!r}: a callback cannot exchange the tensors of "
                "an optimizer in the middle of a run; use RegularizedTrainer"
            )
        if method.strategy == "element":
            raise ValueError(_no_entries("strategy='element' freezes"))
        self.method = method
        self._model: nn.Module | None = None

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **others: Any
    ) -> None:
        """Draw the half of this stage."""
        kind = str(getattr(AcceleratorState().distributed_type, "value", ""))
        if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"):
            raise ValueError(
                f"{_NAME}: {kind} is not supported: it flattens or partitions tensors that must be frozen one by one; "
                "use DistributedDataParallel (torchrun, accelerate launch)"
            )
        if optimizer is not None:
            raise ValueError(
                f"{_NAME}: optimizers holds a {type(optimizer).__name__} that was built before the half was drawn; "
                "pass optimizer_cls_and_kwargs=(torch.optim.AdamW, {'lr': 1e-4}) or set args.optim"
            )
        if getattr(args, "restore_callback_states_from_checkpoint", False):
            raise ValueError(
                f"{_NAME}: restore_callback_states_from_checkpoint=True would replace this callback by a copy without "
                "its method; set it to False (the half needs no restoring, it is drawn from seed and stage)"
            )
        check_base_weights(self.method, model)
        stage = self.method.stage
        self.method.attach(model)
        if any(isinstance(mask, Tensor) for mask in self.method.mask().values()):
            self.method.finish(model)
            self.method.stage = stage
            raise ValueError(_no_entries("balance='params' freezes blocks of fused matrices,"))
        self._model = unwrap(model)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **others: Any
    ) -> None:
        """Check that what trains is what was drawn, before the first step."""
        if self._model is None or unwrap(model) is not self._model:
            raise RuntimeError(
                f"{_NAME}: no half of this model is drawn: pass the callback to the trainer's constructor "
                "(callbacks=[...]), with model= and not model_init=, and build a new trainer for every stage"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        frozen = [name for name, p in self._model.named_parameters() if not p.requires_grad and id(p) in held]
        if frozen:
            raise ValueError(
                f"{_NAME}: the trainer's optimizer holds {frozen[0]!r}, which is frozen, and its weight decay may move "
                "it; create_optimizer must leave out what needs no gradient"
            )
        if state.global_step > 0:
            self._check_resumed(state)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Set the frozen half free."""
        if self._model is not None:
            self.method.finish(self._model)
            self._model = None

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps, to tell a checkpoint of another half."""
        frozen = [name for name, trained in self.method.mask().items() if trained is False]
        return {"args": {}, "attributes": {"stage": self.method.stage - 1, "frozen": frozen}}

    def _check_resumed(self, state: Any) -> None:
        saved = (state.stateful_callbacks or {}).get(_NAME, {}).get("attributes")
        if saved is None:
            raise ValueError(
                f"{_NAME}: the checkpoint was written without this callback, so that its optimizer knows no half; "
                "start anew from its weights instead"
            )
        if saved["frozen"] != self.state()["attributes"]["frozen"]:
            raise ValueError(
                f"{_NAME}: the checkpoint is one of stage {saved['stage']}, this run drew another half as stage "
                f"{self.method.stage - 1}; build HalfFineTuning as then, and set method.stage = {saved['stage']} before "
                "the trainer"
            )


def _no_entries(what: str) -> str:
    return (
        f"{_NAME}: {what} single entries of a tensor, whose gradients must be masked before clipping, where a callback "
        "is not called; use RegularizedTrainer, or a strategy that freezes whole tensors"
    )

"""What a Hugging Face trainer provides in its configuration, and what is refused by name before any work is done."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ..regularizer import Regularizer, check_requirements, leaves
from .peft_models import base_model_of, is_prompt_learning
from .trainer_data import has_positions

TRAINER = "trainer"
"""`criterion="trainer"`: the trainer's own `compute_loss`."""


def is_packed(trainer: Any) -> bool:
    """Whether a row of a batch holds several examples, or a piece of one."""
    arguments = trainer.args
    return bool(
        getattr(arguments, "packing", False)
        or getattr(arguments, "padding_free", False)
        or getattr(trainer, "padding_free", False)
        or getattr(trainer.data_collator, "padding_free", False)
        or type(trainer.data_collator).__name__ == "DataCollatorWithFlattening"
    )


def provided(trainer: Any) -> set[str]:
    """Which of `wellposed.regularizer.REQUIREMENTS` this trainer provides, as it is configured."""
    found = {"closure", "gradients", "optimizer"}
    if has_positions(trainer.train_dataset) and not is_packed(trainer):
        found.add("index")
    if trainer.eval_dataset is not None:
        found.add("validation")
    if _twice_differentiable(trainer.model):
        found.add("double_backward")
    return found


def _twice_differentiable(model: nn.Module) -> bool:
    attention = getattr(getattr(base_model_of(model), "config", None), "_attn_implementation", None)
    if attention in (None, "eager"):
        return True
    fused = torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled()
    # Inside `sdpa_kernel(SDPBackend.MATH)` neither fused kernel is allowed.
    return attention == "sdpa" and not fused


def check_arguments(name: str, regularizer: Any, criterion: Any, options: dict[str, Any]) -> None:
    """Types of the constructor's arguments.

    Raises:
        TypeError: naming the argument.
        ValueError: for a criterion that is no function, a loss replaced twice, or `model_init`.
    """
    if not isinstance(regularizer, Regularizer):
        raise TypeError(f"{name}: regularizer must be a Regularizer, got {type(regularizer).__name__}")
    if not (criterion is None or criterion == TRAINER or callable(criterion)):
        raise ValueError(f"{name}: criterion must be None, 'trainer' or a function, got {criterion!r}")
    if options.get("model_init") is not None:
        raise ValueError(
            f"{name}: model_init would build a second model under the same regularizer, whose state belongs to one; "
            "pass model=, and a new trainer with a new regularizer for each trial"
        )


def check_loss(name: str, regularizer: Regularizer, criterion: Any, trainer: Any) -> None:
    """Whether the criterion is one that the trainer's options, its model and the method agree on.

    Raises:
        ValueError: naming the option that would be ignored.
    """
    if criterion == TRAINER:
        if regularizer.replaces_loss:
            owners = [type(part).__name__ for part in leaves([regularizer]) if part.replaces_loss]
            raise ValueError(
                f"{name}: {owners[0]} replaces the task loss, and criterion='trainer' is the trainer's own; leave "
                "criterion as it is"
            )
        return
    if criterion is not None:
        return
    keep = "pass criterion='trainer' to keep the trainer's own loss, or an unreduced criterion of your own"
    if getattr(trainer.args, "label_smoothing_factor", 0):
        raise ValueError(
            f"{name}: label_smoothing_factor belongs to the trainer's loss, which criterion replaces; {keep}, or use "
            "wellposed.losses.LabelSmoothing"
        )
    if trainer.compute_loss_func is not None:
        raise ValueError(f"{name}: compute_loss_func would be ignored; {keep}")
    if getattr(getattr(base_model_of(trainer.model), "config", None), "output_router_logits", False):
        raise ValueError(f"{name}: the model adds a loss of its own for its router (output_router_logits); {keep}")
    if len(trainer.label_names) != 1:
        raise ValueError(f"{name}: the model has labels {trainer.label_names}, the default criterion takes one; {keep}")
    if is_prompt_learning(trainer.model):
        raise ValueError(f"{name}: PEFT's prompt learning makes outputs longer than the labels; {keep}")


def check_surroundings(name: str, regularizer: Regularizer, trainer: Any) -> None:
    """Refuse what this adapter does not drive, before training.

    Raises:
        ValueError: naming the option.
    """
    arguments, accelerator = trainer.args, trainer.accelerator
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise ValueError(
            f"{name}: {kind} is not supported: hooks read and write whole parameters and gradients; use "
            "DistributedDataParallel (torchrun, accelerate launch)"
        )
    parallel = getattr(accelerator, "parallelism_config", None)
    sizes = {key: getattr(parallel, f"{key}_size", 1) or 1 for key in ("tp", "cp", "sp")} if parallel else {}
    if any(size > 1 for size in sizes.values()):
        raise ValueError(f"{name}: parallelism_config with {sizes} is not supported; use data parallelism alone")
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{name}: nn.DataParallel over {arguments.n_gpu} devices is not supported; launch with torchrun, or make one "
            "device visible"
        )
    if arguments.auto_find_batch_size:
        raise ValueError(
            f"{name}: auto_find_batch_size would repeat steps that a method has already seen; set it to False"
        )
    if "lomo" in str(getattr(arguments.optim, "value", arguments.optim)):
        raise ValueError(f"{name}: optim={arguments.optim!r} steps during the backward pass, before on_gradients")
    if is_packed(trainer) and "on_batch" in regularizer.acts_in:
        parts = [type(part).__name__ for part in leaves([regularizer]) if "on_batch" in part.acts_in]
        raise ValueError(
            f"{name}: {parts[0]} acts on the examples of a batch, and with packing a row is no example; set packing=False "
            "and padding_free=False"
        )
    checkpointing = getattr(arguments, "activation_checkpointing_kwargs", None) or getattr(
        arguments, "gradient_checkpointing_kwargs", None
    )
    if (checkpointing or {}).get("use_reentrant") and regularizer.acts_in & {"on_gradients", "on_batch"}:
        raise ValueError(
            f"{name}: gradient checkpointing with use_reentrant=True cannot be evaluated again inside a step; set "
            "use_reentrant=False"
        )
    if regularizer.coupled and arguments.gradient_accumulation_steps > 1:
        warnings.warn(
            f"{type(regularizer).__name__} couples the examples of a batch; with gradient_accumulation_steps="
            f"{arguments.gradient_accumulation_steps} it sees each micro-batch by itself",
            stacklevel=4,
        )


def check_provided(name: str, regularizer: Regularizer, trainer: Any, assume: set[str] | None = None) -> None:
    """Compare `regularizer.requires` with what the trainer provides.

    Raises:
        RequirementError: naming both sides.
    """
    where = name
    if is_packed(trainer) and "index" in regularizer.requires:
        where = f"{name} with packing (a row is no example; set packing=False and padding_free=False)"
    check_requirements(regularizer, provided(trainer) | (assume or set()), where)


def check_optimizer(name: str, regularizer: Regularizer, trainer: Any) -> None:
    """Refuse an optimizer that exists before the method is attached, where the method changes what it must hold.

    Raises:
        ValueError: naming `optimizers`.
    """
    if trainer.optimizer is None:
        return
    for part in leaves([regularizer]):
        hooks = [hook for hook in ("attach", "parameter_groups") if hook in part.acts_in]
        if hooks:
            raise ValueError(
                f"{name}: optimizers holds an optimizer that is already built, but {type(part).__name__} acts in "
                f"{hooks[0]}, which comes before the optimizer; pass optimizer_cls_and_kwargs=(torch.optim.AdamW, "
                "{'lr': 1e-4}) or set args.optim"
            )

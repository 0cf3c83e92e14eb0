"""Self-tuning networks (STN) and Delta-STN: hyperparameters learned within one training run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ..batching import unwrap
from ..bilevel import BilevelProblem
from ..hyperparameter import substituted
from ..parameters import apply_lr_factors, clip_gradients, parameter_groups
from ..step import copied_buffers
from ..training_objective import bare
from ..tuner import STATE_HOOKS, StepInfo, Tuner
from .batch_level import check_penalties, for_the_batch
from .batch_share import average_gradients, count_examples, places_in_whole_batch
from .bilevel_updates import averaged_over_ranks
from .conversion import collapse, convert, is_converted, response_parameters, response_state
from .linearization import explained_forward_mode
from .perturbation import Perturbations, inverse_softplus, perturbation_entropy
from .schedule import Schedule
from .self_tuning_checks import acts_on_gradients, check_arguments, has_statistics

MakeOptimizer = Callable[[Any], Optimizer]


class SelfTuner(Tuner):
    """Learns hyperparameters in one run by a network that responds to them: STN and Delta-STN.

    Training steps fit the responding network under randomly perturbed hyperparameters, so that its weights become a
    function of them; validation steps then descend the validation loss through that function. The training loss is
    never differentiated in a hyperparameter: dropout rates, augmentations and counts can be learned.

        training:    min over phi of  E_e L_train(T(u + e), w_phi(u + e)),    e ~ N(0, diag(s^2)), one for each example
        validation:  min over u, s of E_e L_val(w_phi(u + e)) - tau H(s)

    STN (MacKay et al. 2019, arXiv 1903.03088): one loss for all parameters. Delta-STN (Bae and Grosse 2020, arXiv
    2010.13514; the default): weights W0, b0 train at the present hyperparameters, response parameters under perturbed
    ones with predictions that are linearised in the response; W0, b0 are the network's weights at any time.

    One `step` is one training step, followed by `valid_steps` validation steps whenever `train_steps` are done.

    Under `torch.distributed`, processes that share every batch equally average the gradients of both levels and take the
    steps of one process. All draw the same perturbations for the whole batch, each takes the rows of its examples, and a
    hyperparameter with one value a batch has one for all processes. They must begin with the same weights and seed;
    running statistics are each process's own. `fit(tuner=)` runs in one process: call `run` or `step`.

    All hooks of a `Regularizer` are run. Under a Delta-STN a method that acts in `on_gradients` runs there twice a
    step, for the gradients of the weights and for those of the response.

    Args:
        problem: its model is converted in place, unless it has response layers already (see `convert`).
        weight_optimizer: of all parameters, e.g. `partial(torch.optim.SGD, lr=0.01, momentum=0.9)` (the default).
        hyper_optimizer: of u, elementwise, e.g. `partial(torch.optim.RMSprop, lr=0.01)` (the default).
        scale_optimizer: of the scales; as `hyper_optimizer` by default.
        scale: initial standard deviations s in unconstrained units: one number, or one by name of hyperparameter.
        tune_scales: whether s is learned; else validation steps use no perturbation.
        tau: weight of the entropy: 0 lets s fall to 0, useful are 1e-5 to 1e-3.
        train_steps, valid_steps: training and validation steps in turn.
        warmup_steps: training steps before the first validation step.
        delta: Delta-STN, or STN.
        linearize: linearise predictions of a Delta-STN in the response while it learns.
        exclude, strict: see `convert`.
        clip_norm: largest norm of the gradient of all parameters, or None.
        amp: `torch.bfloat16` for mixed precision in the network; losses, charts and entropy stay in float32.
        generator, seed: of the perturbations and of the initial response.

    Attributes:
        schedule: values of the hyperparameters over training steps.
        trained: training steps done.

    Raises:
        ValueError: for an argument out of range; for a model that cannot be converted; in the first step if a
            hyperparameter with `per_example=True` is read for a whole batch; in several processes for a method that acts
            in `on_gradients`, whose re-evaluations see one process's share alone.
        NotImplementedError: with `linearize`, in the first step, for an operation without forward-mode derivative.

    Example:
        >>> from wellposed import fit
        >>> from wellposed.features import Dropout
        >>> from wellposed.hyperparameter import Hyperparameter
        >>> data = torch.utils.data.TensorDataset(torch.randn(40, 3), torch.arange(40) % 2)
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> rate = Hyperparameter(0.1, 0.0, 0.9, per_example=True)
        >>> result = fit(net, data, validation=data, epochs=2, regularizer=Dropout(rate), tuner=SelfTuner)
        >>> type(result.model[0]).__name__, 0 < float(rate.value) < 0.9
        ('Linear', True)
    """

    requires = frozenset({"response_layers"})
    drives = frozenset(STATE_HOOKS)

    def __init__(
        self,
        problem: BilevelProblem,
        weight_optimizer: MakeOptimizer | None = None,
        hyper_optimizer: MakeOptimizer | None = None,
        scale_optimizer: MakeOptimizer | None = None,
        scale: float | Mapping[str, float] = 1.0,
        tune_scales: bool = True,
        tau: float = 1e-3,
        train_steps: int = 5,
        valid_steps: int = 1,
        warmup_steps: int = 0,
        delta: bool = True,
        linearize: bool = True,
        *,
        exclude: Collection[str] = (),
        strict: bool = True,
        clip_norm: float | None = None,
        amp: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> None:
        check_arguments(locals())
        self._hooked = acts_on_gradients(problem)
        self.generator = torch.Generator().manual_seed(seed) if generator is None else generator
        if not is_converted(problem.model):
            convert(problem.model, problem.hypers, exclude, strict, delta=delta, generator=self.generator)
            added = set(response_parameters(problem.model))
            problem.params.update({n: p for n, p in bare(problem.model).items() if n in added})
        super().__init__(problem)
        self.response = response_state(problem.model)
        self.perturbations = Perturbations(problem.hypers)
        if self.response.size != self.perturbations.size or self.response.centred != delta:
            raise ValueError(
                f"SelfTuner: the model was converted for {self.response.size} values and delta={self.response.centred}, "
                f"but the problem has {self.perturbations.size} and delta={delta}"
            )
        self.delta, self.linearize = delta, linearize
        self.tune_scales, self.tau = tune_scales, tau
        self.train_steps, self.valid_steps, self.warmup_steps = train_steps, valid_steps, warmup_steps
        self.clip_norm, self.amp = clip_norm, amp
        responding = set(response_parameters(problem.model))
        self._responding = [p for n, p in problem.params.items() if n in responding]
        self._general = [p for n, p in problem.params.items() if n not in responding]
        self._has_statistics = has_statistics(problem.model)
        first = next(iter(problem.params.values()))
        self._device, self._dtype = first.device, first.dtype
        self.u = self.perturbations.vector().to(self._device, torch.promote_types(self._dtype, torch.float32))
        self.log_scale = inverse_softplus(self.perturbations.scales(scale, "SelfTuner")).to(self.u)
        for leaf in (self.u, self.log_scale):
            leaf.requires_grad_()
        if not delta:
            self.response.reference.copy_(self.u.detach())
        make_hyper = hyper_optimizer or partial(torch.optim.RMSprop, lr=1e-2)
        self.weight_optimizer = self._build(weight_optimizer or partial(torch.optim.SGD, lr=0.01, momentum=0.9))
        self.hyper_optimizer = make_hyper([self.u])
        self.scale_optimizer = (scale_optimizer or make_hyper)([self.log_scale])
        self.trained, self._checked = 0, False
        self.schedule = Schedule()
        self.schedule.record(0, self.recorded_values())

    @property
    def scale(self) -> Tensor:
        """s: (n,) standard deviations of the perturbations, in unconstrained units."""
        return F.softplus(self.log_scale.detach())

    def step(self, train: Iterator[Any], validation: Iterator[Any]) -> StepInfo:
        """One training step, and the validation steps that are due after it."""
        inner = self.training_step(next(train))
        since = self.trained - self.warmup_steps
        if since <= 0 or since % self.train_steps:
            return StepInfo(inner)
        outer = 0.0
        for _ in range(self.valid_steps):
            outer = self.validation_step(next(validation))
        values = self.recorded_values()
        self.schedule.record(self.trained, values)
        return StepInfo(inner, outer, values, {"scale": float(self.scale.mean())})

    def training_step(self, batch: Any) -> float:
        """Move all parameters once; hyperparameters and scales stay. Returns the loss at the present hyperparameters
        (Delta-STN) or at perturbed ones (STN).
        """
        problem = self.problem
        problem.begin()
        self.weight_optimizer.zero_grad(set_to_none=True)
        u = self.u.detach()
        noise = self._draw(batch) * self.scale
        perturbed = self.perturbations.split(u + noise)
        if self.delta:
            # The response first: what is evaluated last is what the method's own state is written from.
            self._phase(batch, perturbed, self._input(noise), self.linearize, keep=self._responding)
            held = {name: h.raw for name, h in problem.hypers.items()}
            loss = self._phase(batch, held, None, False, keep=self._general)
            in_hooks = {}
        else:
            k = self._input(u + noise - self.response.reference)
            loss = self._phase(batch, perturbed, k, False, keep=None)
            in_hooks = for_the_batch(perturbed, problem.hypers, "on_step")
        loss = average_gradients(problem.params.values(), loss)
        if self.clip_norm is not None:
            clip_gradients(problem.model, self.clip_norm)
        self.weight_optimizer.step()
        with substituted(in_hooks):
            problem.on_step()
        self.trained += 1
        self.schedule.total = self.trained
        return float(loss)

    def validation_step(self, batch: Any) -> float:
        """Move hyperparameters and scales once; all parameters stay. Returns the validation loss."""
        noise = self._draw(batch) if self.tune_scales else torch.zeros_like(self.u)[None]
        scale = F.softplus(self.log_scale)
        moved = self.u + noise * scale
        centre = self.u.detach() if self.delta else self.response.reference
        with self.response.at(self._input(moved - centre)), self._autocast():
            raw = self.perturbations.split(moved)
            loss = self.problem.evaluate(self.problem.outer_loss, self.problem.params, raw, batch)
        objective, leaves = loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss, [self.u]
        if self.tune_scales:
            objective = objective - self.tau * perturbation_entropy(scale)
            leaves.append(self.log_scale)
        # The loss too: all processes must see the same number, or only one would end on a loss that is not finite.
        *gradients, loss = averaged_over_ranks([*torch.autograd.grad(objective, leaves), loss.detach()])
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        self.hyper_optimizer.step()
        if self.tune_scales:
            self.scale_optimizer.step()
        self._settle()
        return float(loss)

    def export(self) -> nn.Module:
        """The plain network at the present hyperparameters; it is collapsed in place, and this tuner is done."""
        return collapse(self.problem.model)

    def extra_state(self) -> dict[str, Any]:
        return {
            "log_scale": self.log_scale.detach().clone(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers()],
            "generator": self.generator.get_state(),
            "trained": self.trained,
            "schedule": self.schedule.to_json(),
        }

    @torch.no_grad()
    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.u.copy_(self.perturbations.vector())
        self.log_scale.copy_(state["log_scale"])
        for optimizer, saved in zip(self._optimizers(), state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.trained = state["trained"]
        self.schedule = Schedule.from_json(state["schedule"])

    def _phase(
        self, batch: Any, raw: dict[str, Tensor], k: Tensor | None, linearized: bool, keep: list[Tensor] | None
    ) -> Tensor:
        """Put the gradients of one training loss into `.grad`, of `keep` alone (None: of all); returns the loss."""
        problem = self.problem
        others = [] if keep is None else self._general if keep is self._responding else self._responding
        # What a hook does to gradients may depend on all of them: only where there is none, the others rest.
        resting = [] if self._hooked else others
        # Running statistics are those of the weights at the present hyperparameters.
        foreign = keep is self._responding and self._has_statistics
        earlier = [p.grad for p in others]
        for parameter in others:
            parameter.grad = None

        def evaluate() -> Tensor:
            for parameter in resting:
                parameter.requires_grad_(False)
            at_k = nullcontext() if k is None else self.response.at(k, linearized)
            explained = explained_forward_mode("SelfTuner") if linearized else nullcontext()
            try:
                with explained, at_k, self._autocast(), copied_buffers(problem.model) if foreign else nullcontext():
                    loss = problem.evaluate(problem.inner_loss, problem.params, raw, batch)
                    if not self._checked:
                        check_penalties(problem, raw)
                        self._checked = True
                    return loss
            finally:
                for parameter in resting:
                    parameter.requires_grad_(True)

        loss = evaluate()
        loss.backward()  # type: ignore[no-untyped-call]
        if keep is not self._responding:
            problem.write_state()
        if self._hooked:
            with substituted(for_the_batch(raw, {} if k is None else problem.hypers, "on_gradients")):
                problem.on_gradients(evaluate)
        for parameter, gradient in zip(others, earlier, strict=True):
            parameter.grad = gradient
        return loss.detach()

    def _draw(self, batch: Any) -> Tensor:
        """Standard normal numbers for as many examples as a batch holds."""
        if not self.perturbations.per_example:
            return self.perturbations.draw(1, self.generator).to(self.u)
        before, rows, after = places_in_whole_batch(count_examples(batch, "SelfTuner"), self._device)
        whole = self.perturbations.draw(before + rows + after, self.generator)
        return whole[before : before + rows].to(self.u)

    def _input(self, k: Tensor) -> Tensor:
        return k.to(self._dtype)

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.amp is None else torch.autocast(self._device.type, dtype=self.amp)

    @torch.no_grad()
    def _settle(self) -> None:
        """Make u what the hyperparameters and the resting network read."""
        self.perturbations.clamp_(self.u)
        self.perturbations.write(self.u)
        if not self.delta:
            self.response.rest.copy_(self.u - self.response.reference)

    def _build(self, make: MakeOptimizer) -> Optimizer:
        objective = self.problem.objective
        if objective is None:
            return make(list(self.problem.params.values()))
        wishes = objective.regularizer.parameter_groups(unwrap(self.problem.model))
        optimizer = make(parameter_groups(self.problem.model, wishes))
        apply_lr_factors(optimizer)
        objective.optimizer = optimizer
        return optimizer

    def _optimizers(self) -> list[Optimizer]:
        return [self.weight_optimizer, self.hyper_optimizer, self.scale_optimizer]

"""A few steps of a method on a study's arm before the job begins, and what they show to be learned."""

from __future__ import annotations

from dataclasses import replace

from ...indexed_dataset import TensorLoader
from ...lab.trial import FIRST_EVALUATION_SEED, Trial
from ...lab.tune_problem import NotTunable
from ..errors import UserError
from ..tune_live import Report
from .prepared import PreparedStudy
from .training import SCALE, Learning


def rehearse_study(prepared: PreparedStudy) -> None:
    """A few steps on a few rows, so that what cannot work fails now; remembers what is learned, and what is not.

    Raises:
        UserError: naming the method, the study and what it cannot do.
    """
    options, slug, arm = prepared.options, prepared.card.slug, prepared.arm.name
    assert prepared.study.tunable is not None
    trial = Trial(slug, arm, SCALE, "evaluate", prepared.defaults, FIRST_EVALUATION_SEED, "")
    try:
        problem = prepared.study.tunable(trial)
        short = replace(problem, train=_few(problem.train), validation=_few(problem.validation), epochs=1)
        learning = Learning(short, options.method, 0, Report(None, ""), rehearsal=True)
        learning.fit()
    except UserError:
        raise
    except NotTunable as error:
        raise UserError(f"{error}. For this arm take --method tpe or random") from error
    except (ArithmeticError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--method {options.method} cannot train the arm '{arm}' of '{slug}': {reason}") from error
    plan = learning.plan
    prepared.left_out = dict(plan.left_out)
    prepared.learned = [s.label for s in plan.strengths if s.label not in plan.left_out]
    fixed = [name for name in prepared.space if name not in prepared.learned]
    for name, why in prepared.left_out.items():
        prepared.notes.append(f"{name} keeps its registered value: {why}")
    if rest := [name for name in fixed if name not in prepared.left_out]:
        keeps = "keeps its registered value" if len(rest) == 1 else "keep their registered values"
        prepared.notes.append(
            f"{', '.join(rest)} {keeps}: only a search tunes settings of the loop, and choices among a few"
        )


def _few(loader: TensorLoader) -> TensorLoader:
    rows = slice(0, 2 * loader.batch_size)
    return TensorLoader(
        loader.inputs[rows], loader.targets[rows], batch_size=loader.batch_size, transform=loader.transform
    )

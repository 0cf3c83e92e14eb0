"""Checks shapes and types of the contract and of the methods while the tests run, and keeps runs comparable."""

import os
import sys
from pathlib import Path

# Before torch is imported: test processes run side by side, and must not fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded at run time

import jaxtyping
from hypothesis import settings
from jaxtyping import install_import_hook

settings.register_profile("wellposed", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("wellposed")

CHECKED = [
    *("accumulation", "averaging", "batching", "bilevel", "charts", "compose", "evaluation", "hyperparameter"),
    *(
        "indexed_dataset",
        "metrics",
        "continual_metrics",
        "numerics",
        "objective",
        "pair",
        "parameters",
        "regularizer",
        "sample_table",
    ),
    *("step", "training_objective", "tuner", "loading"),
    *("weights", "losses", "features", "gradients", "inverse"),
]
# Response layers also take inputs without a batch, and refuse other shapes with the layer's name themselves.
TUNING = Path(__file__).parent / "src" / "wellposed" / "tuning"
CHECKED += [
    f"tuning.{file.stem}"
    for file in sorted(TUNING.glob("[a-z]*.py"))
    if file.stem not in ("response_functions", "response_input")
]
sys.path.insert(0, str(Path(__file__).parent / "tests" / "support"))
_jaxtyped = jaxtyping.jaxtyped


def _outer_functions_only(*args, **options):
    """Nested functions would be decorated, about a millisecond each, at every call of the outer one."""
    decorate = _jaxtyped(*args, **options)
    return lambda f: f if "<locals>" in getattr(f, "__qualname__", "") else decorate(f)


jaxtyping.jaxtyped = _outer_functions_only
hook = install_import_hook([f"wellposed.{name}" for name in CHECKED], "wellposed_typechecker.check")

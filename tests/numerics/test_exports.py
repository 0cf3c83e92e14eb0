"""The room's lazy names are the functions, in whatever order its files are imported."""

from __future__ import annotations

import importlib

import wellposed.numerics as numerics


def test_every_public_name_is_callable_after_every_file_is_imported():
    for file in ("eigenvalues", "hessian", "linear_solve", "per_example", "simplex", "tree"):
        importlib.import_module(f"wellposed.numerics.{file}")
        assert file not in numerics.__all__  # a file named after its function would take the function's place
    assert all(callable(getattr(numerics, name)) for name in numerics.__all__)
